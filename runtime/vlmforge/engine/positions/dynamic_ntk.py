"""Dynamic NTK: the longer the prompt, the more slowly the angles turn, by levels."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from msgspec import Struct

from vlmforge.engine.fields import TokenCount
from vlmforge.engine.positions.absolute import RotaryTables
from vlmforge.engine.positions.in_graph import InGraph
from vlmforge.field_rules import Int


class DynamicNTK(InGraph, Struct, frozen=True):
    """By the level of the sequence too, which its whole prompt decides and which it keeps.

    Keys and values of another level are of no use to a sequence.

    Attributes:
        trained_length: Tokens up to which a prompt has level 0.
        levels: Number of levels that the decoder knows; longer prompts have the last.
    """

    trained_length: TokenCount
    levels: Annotated[int, Int(1, 64)]
    name: Literal["dynamic_ntk"] = "dynamic_ntk"

    @property
    def has_levels(self) -> bool:
        """Whether the decoder takes a level for each sequence."""
        return True

    def level(self, prompt_tokens: int) -> int:
        """The level of a sequence with a prompt of that many tokens, > 0."""
        return min(level_of(prompt_tokens, self.trained_length), self.levels - 1)

    @property
    def extends(self) -> bool:
        """False: the levels, and where each begins among the tables, are compiled in."""
        return False

    @property
    def attention_window(self) -> int | None:
        """None: the model attends to all tokens."""
        return None

    def table_bytes(self, positions: int) -> int:
        """No tables are made at load."""
        del positions
        return 0

    def longer_tables(self, positions: int) -> RotaryTables | None:
        """None: those of the build are all."""
        del positions
        return None


def level_of(tokens: int, trained_length: int) -> int:
    """0 up to `trained_length` tokens, 1 up to twice as many, 2 up to four times ...

    Dynamic NTK as published computes `alpha = max(2 ** ceil(log2(tokens / trained_length) + 1) - 1,
    1)`; this is the exponent, less one, by the same floating-point steps.
    """
    return max(math.ceil(math.log(tokens / trained_length, 2) + 1), 1) - 1
