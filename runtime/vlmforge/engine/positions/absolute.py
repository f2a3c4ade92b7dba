"""Rotary angles by a token's place alone (https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.engine.fields import TokenCount
from vlmforge.engine.positions.in_graph import InGraph
from vlmforge.field_rules import Number

Frequency = Annotated[float, Number(0, 1e6)]


class RotaryTables(NamedTuple):
    """Cosines and sines, float32 `[positions, frequencies]`."""

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]


class Absolute(InGraph, Struct, frozen=True):
    """How the positions of a sequence become rotary angles: position times inverse frequency.

    Attributes:
        trained_length: Tokens of the longest sequence in training; None: not known.
        attention_window: Tokens that the model attends to; the engine attends to all, so that
            longer sequences would not be the model's. None: the model does too.
        inverse_frequencies: Radians a position, the exact float32 values; empty: not known, as in
            engines of before schema version 3.
    """

    trained_length: TokenCount | None = None
    attention_window: TokenCount | None = None
    inverse_frequencies: tuple[Frequency, ...] = ()
    name: Literal["absolute"] = "absolute"

    @property
    def has_levels(self) -> bool:
        """Whether the decoder takes a level for each sequence."""
        return False

    def level(self, prompt_tokens: int) -> int:
        """The level of a sequence with a prompt of that many tokens, > 0."""
        del prompt_tokens
        return 0

    @property
    def extends(self) -> bool:
        """Whether tables can be made of more positions than were built."""
        return bool(self.inverse_frequencies)

    def table_bytes(self, positions: int) -> int:
        """Bytes of the tables of that many positions."""
        return 2 * 4 * len(self.inverse_frequencies) * positions

    def longer_tables(self, positions: int) -> RotaryTables | None:
        """The tables of that many positions: those of the build, continued; None: not known."""
        return rotary_tables(self.inverse_frequencies, positions) if self.extends else None


def rotary_tables(inverse_frequencies: Sequence[float], positions: int) -> RotaryTables:
    """The tables of positions 0, 1, ...

    Angles are float32 products, as the original implementations compute them. Their cosines and
    sines are rounded from float64, so that builder and runtime agree in every bit on any machine;
    the originals' own float32 functions are within one unit in the last place of that.
    """
    frequencies = np.array(inverse_frequencies, np.float32)
    return rounded_turns(np.multiply.outer(np.arange(positions, dtype=np.float32), frequencies))


def rounded_turns(angles: NDArray[np.float32]) -> RotaryTables:
    """Cosines and sines of angles, float32, rounded from float64."""
    cos, sin = np.empty_like(angles), np.empty_like(angles)
    np.cos(angles, out=cos, dtype=np.float64, casting="same_kind")
    np.sin(angles, out=sin, dtype=np.float64, casting="same_kind")
    return RotaryTables(cos, sin)
