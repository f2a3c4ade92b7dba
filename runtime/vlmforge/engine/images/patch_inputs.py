"""What a vision part takes that is given patches instead of views, beside the patches themselves.

All of it follows from an image's grid of tokens, so the runtime calculates it, and the graph has
gathers and products only. Everything is as long as the image is large: windows are of one size, and
those at an edge are filled up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.engine.positions.absolute import rounded_turns

PATCH_COS, PATCH_SIN = "patch_cos", "patch_sin"
WINDOW_ROWS, WINDOW_SIZES, WINDOW_PLACES = "window_rows", "window_sizes", "window_places"
PLACE_ROWS, PLACE_WEIGHTS = "place_rows", "place_weights"

Grid: TypeAlias = tuple[int, int]
"""Tokens of an image from top to bottom, and from left to right."""

Arrays: TypeAlias = Mapping[str, NDArray[Any]]

NO_ARRAYS: Arrays = {}


class PatchInputs(Struct, frozen=True):
    """Sizes of what such a part takes.

    Attributes:
        group: Patches of a token.
        values: Of a patch.
        angles: Rotary angles of a patch.
        window: Tokens of a window of its attention; 0: it has none.
        places: Whether its table of places is interpolated.
    """

    group: int
    values: int
    angles: int
    window: int
    places: bool


def turns(grid: Grid, merge: int, inverse_frequencies: tuple[float, ...]) -> Arrays:
    """Cosines and sines, float32 `[tokens, merge * merge, 2 * frequencies]`: of rows, of columns.

    Patches are turned by their place in both directions (https://arxiv.org/abs/2409.12191, 2.1).
    """
    frequencies = np.array(inverse_frequencies, np.float32)
    angles = [
        np.multiply.outer(axis.astype(np.float32), frequencies) for axis in _axes(grid, merge)
    ]
    cos, sin = rounded_turns(np.concatenate(angles, axis=-1))
    return {PATCH_COS: cos, PATCH_SIN: sin}


def windows(grid: Grid, side: int) -> Arrays:
    """The windows of `side * side` tokens that a grid is cut into, from its upper left corner.

    Returns `window_rows` int64 `[windows, side * side]`, which tokens are in each, those that there
    are first; `window_sizes` int64 `[windows]`, how many there are; and `window_places` int64
    `[tokens]`, where each token is in all windows one after the other.
    """
    down, across = (-(-length // side) for length in grid)
    tokens = np.full((down * side, across * side), -1, np.int64)
    tokens[: grid[0], : grid[1]] = np.arange(grid[0] * grid[1]).reshape(grid)
    cut = tokens.reshape(down, side, across, side).swapaxes(1, 2).reshape(down * across, -1)
    missing = cut < 0
    rows = np.take_along_axis(cut, np.argsort(missing, axis=1, kind="stable"), axis=1)
    there = np.flatnonzero(rows.reshape(-1) >= 0)
    places = np.empty(len(there), np.int64)
    places[rows.reshape(-1)[there]] = there
    return {
        WINDOW_ROWS: np.maximum(rows, 0),
        WINDOW_SIZES: np.count_nonzero(~missing, axis=1).astype(np.int64),
        WINDOW_PLACES: places,
    }


def interpolation(grid: Grid, merge: int, side: int) -> Arrays:
    """How a table of `side * side` places is stretched to the patches of a grid, bilinearly.

    Corners are aligned. Returns `place_rows` int64 and `place_weights` float32, both
    `[tokens, merge * merge, 4]`.
    """
    down, across = (
        _taps(axis, length * merge, side)
        for axis, length in zip(_axes(grid, merge), grid, strict=True)
    )
    rows = down[0][..., :, None] * side + across[0][..., None, :]
    weights = down[1][..., :, None] * across[1][..., None, :]
    shape = (*rows.shape[:2], 4)
    return {PLACE_ROWS: rows.reshape(shape), PLACE_WEIGHTS: weights.reshape(shape)}


def _axes(grid: Grid, merge: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`[tokens, merge * merge]`: the row of each patch, and its column."""
    down, across = grid
    rows, columns = np.mgrid[: down * merge, : across * merge]

    def by_token(values: NDArray[Any]) -> NDArray[np.int64]:
        blocks = values.reshape(down, merge, across, merge).swapaxes(1, 2)
        return blocks.reshape(down * across, merge * merge).astype(np.int64)

    return by_token(rows), by_token(columns)


def _taps(
    index: NDArray[np.int64], length: int, side: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The two neighbours in the table of each place on an axis, and their weights."""
    source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(length - 1, 1))
    floor = np.floor(source)
    offsets = np.arange(2)
    taps = np.clip(floor.astype(np.int64)[..., None] + offsets, 0, side - 1)
    distance = np.abs(source[..., None] - floor[..., None] - offsets.astype(np.float32))
    return taps, np.maximum(np.float32(1) - distance, np.float32(0))
