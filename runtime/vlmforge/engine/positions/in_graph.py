"""What a policy answers whose decoder finds the angles of its tokens by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

AXES = 3
"""Of a token's place: time, down, across."""

Places = NDArray[np.int64]
"""`[tokens, AXES]`, where tokens are."""


class PlacedGrid(NamedTuple):
    """An image in a prompt: its first token, and its tokens down and across."""

    start: int
    down: int
    across: int


class InGraph:
    """By how many tokens come before: nothing is calculated outside."""

    @property
    def turn_width(self) -> int:
        """Cosines and sines that the decoder takes for each token; 0: none."""
        return 0

    def places(self, tokens: int, images: Sequence[PlacedGrid]) -> Places | None:
        """Where each token of a prompt is; None: nobody asks."""
        del tokens, images
        return None

    def turns(self, places: Places) -> NDArray[np.float32]:
        """Float32 `[..., turn_width]`: the cosines of tokens at these places, then the sines."""
        return np.empty((*places.shape[:-1], 0), np.float32)
