"""Places on several axes: in time, down and across (M-RoPE, https://arxiv.org/abs/2409.12191).

A text goes on along all axes at once. The tokens of an image are at one time, and each in its row
and column; what follows goes on behind the longer of its sides. So places advance more slowly than
tokens, and a sequence keeps by how much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.engine.fields import TokenCount
from vlmforge.engine.positions.absolute import Frequency, RotaryTables, rounded_turns
from vlmforge.engine.positions.in_graph import AXES, PlacedGrid, Places
from vlmforge.engine.schema import Agreeing
from vlmforge.field_rules import Int

Axis = Annotated[int, Int(0, AXES - 1)]


class Axes(Agreeing, Struct, frozen=True):
    """Angles are calculated here and handed to the decoder, which knows no positions.

    Attributes:
        trained_length: Tokens of the longest sequence in training.
        inverse_frequencies: Radians a place, the exact float32 values.
        axes: Which place each of them multiplies: 0 in time, 1 down, 2 across.
    """

    trained_length: TokenCount
    inverse_frequencies: tuple[Frequency, ...]
    axes: tuple[Axis, ...]
    name: Literal["axes"] = "axes"

    @override
    def disagreements(self) -> Iterator[tuple[str, str]]:
        if len(self.axes) != len(self.inverse_frequencies) or not self.axes:
            yield "axes", "one for each of the inverse_frequencies"

    @property
    def has_levels(self) -> bool:
        """False: the angles of a sequence do not depend on its length."""
        return False

    def level(self, prompt_tokens: int) -> int:
        """The level of a sequence with a prompt of that many tokens, > 0."""
        del prompt_tokens
        return 0

    @property
    def extends(self) -> bool:
        """True: no table ends."""
        return True

    @property
    def attention_window(self) -> int | None:
        """None: the model attends to all tokens."""
        return None

    def table_bytes(self, positions: int) -> int:
        """No tables are made at load."""
        del positions
        return 0

    def longer_tables(self, positions: int) -> RotaryTables | None:
        """None: there are none."""
        del positions
        return None

    @property
    def turn_width(self) -> int:
        """Cosines and sines that the decoder takes for each token."""
        return 2 * len(self.axes)

    def places(self, tokens: int, images: Sequence[PlacedGrid]) -> Places | None:
        """Int64 `[tokens, 3]`, where each token of a prompt is; `images` are in order."""
        places = np.empty((tokens, AXES), np.int64)
        token, place = 0, 0  # that come next
        for start, down, across in images:
            place += _text(places[token:start], place)
            token = start + down * across
            grid = places[start:token].reshape(down, across, AXES)
            grid[..., 0] = place
            grid[..., 1] = place + np.arange(down)[:, None]
            grid[..., 2] = place + np.arange(across)
            place += max(down, across)
        _text(places[token:], place)
        return places

    def turns(self, places: Places) -> NDArray[np.float32]:
        """Float32 `[..., turn_width]`: the cosines of tokens at these places, then the sines."""
        frequencies = np.array(self.inverse_frequencies, np.float32)
        chosen = places[..., np.array(self.axes)].astype(np.float32)
        return np.concatenate(rounded_turns(chosen * frequencies), axis=-1)


def _text(places: Places, first: int) -> int:
    """Number the tokens of a text from `first` on, along all axes; returns how many they are."""
    places[:] = first + np.arange(len(places))[:, None]
    return len(places)
