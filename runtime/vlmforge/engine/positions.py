"""Position policies: what the decoder needs to know of a sequence beside where its tokens are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlmforge.errors import EngineFormatError

POLICIES = ("absolute", "dynamic_ntk")


@dataclass(frozen=True, slots=True)
class PositionPolicy:
    """How the positions of a sequence become rotary angles.

    Attributes:
        name: "absolute": by the token's place alone. "dynamic_ntk": by the level of the sequence
            too, which its whole prompt decides and which it keeps while it grows. Keys and values
            of another level are of no use to it.
        trained_length: Tokens up to which a prompt has level 0; 0 where there are no levels.
        levels: Number of levels that the decoder knows; longer prompts have the last.
    """

    name: str
    trained_length: int
    levels: int

    @property
    def has_levels(self) -> bool:
        """Whether the decoder takes a level for each sequence (EngineFormatError: unknown name)."""
        if self.name not in POLICIES:
            raise EngineFormatError(
                "The position policy that the engine asks for is unknown to this version.",
                found=repr(self.name),
                expected="one of: " + ", ".join(POLICIES),
                fix="install a newer vlmforge, or build the engine again",
            )
        return self.name == "dynamic_ntk"

    def level(self, prompt_tokens: int) -> int:
        """The level of a sequence with a prompt of that many tokens, > 0."""
        if not self.has_levels:
            return 0
        return min(level_of(prompt_tokens, self.trained_length), self.levels - 1)


ABSOLUTE = PositionPolicy("absolute", 0, 1)


def level_of(tokens: int, trained_length: int) -> int:
    """0 up to `trained_length` tokens, 1 up to twice as many, 2 up to four times ...

    Dynamic NTK as published computes `alpha = max(2 ** ceil(log2(tokens / trained_length) + 1) - 1,
    1)`; this is the exponent, less one, by the same floating-point steps.
    """
    return max(math.ceil(math.log(tokens / trained_length, 2) + 1), 1) - 1
