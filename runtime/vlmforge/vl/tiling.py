"""Images of any resolution: cut into views of one size, whose rows are merged to tokens.

An image is resized, its aspect ratio kept, onto the canvas that fits it best; the canvas is cut
into tiles. The views are the whole image squeezed to one tile, then the tiles row by row. The
vision part gives each view a square of rows; those of the tiles are put together as the canvas was,
what shows padding is left out, and a learned row ends each line. Everything here follows from the
image's size alone, so the number of tokens is known before anything is run.

The arithmetic, its floating point included, is that of the implementations that models were trained
with: a recipe says which of them its checkpoint follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vlmforge.engine.image_policy import Size, Tiling
from vlmforge.errors import EngineFormatError

Box = tuple[int, int, int, int]
Rows = NDArray[np.int64]
T = TypeVar("T")


def best_canvas(size: Size, canvases: tuple[Size, ...]) -> Size:
    """The canvas that keeps most of the image's pixels, and of these the one that wastes least."""
    width, height = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)  # of equals the first


def fitted_size(size: Size, canvas: Size) -> Size:
    """`size` scaled to fill one side of the canvas; the other side is rounded up."""
    width, height = size
    across, down = canvas[0] / width, canvas[1] / height
    if across < down:
        return canvas[0], min(math.ceil(height * across), canvas[1])
    return min(math.ceil(width * down), canvas[0]), canvas[1]


def tile_boxes(canvas: Size, tile: int) -> tuple[Box, ...]:
    """Boxes of the tiles of a canvas, row by row."""
    return tuple(
        (x, y, x + tile, y + tile)
        for y in range(0, canvas[1], tile)
        for x in range(0, canvas[0], tile)
    )


def view_count(size: Size, tiling: Tiling) -> int:
    """Number of views of an image of this size."""
    width, height = best_canvas(size, tiling.canvases)
    return 1 + (width // tiling.tile) * (height // tiling.tile)


def token_rows(size: Size, tiling: Tiling) -> Rows:
    """The rows that become the tokens of an image of this size, in order.

    Returns:
        int64 `[tokens]`: row r of view v is `v * view_rows + r`.

    Raises:
        EngineFormatError: a merge or rounding that this version does not know.
    """
    merge = _known("way to merge views", tiling.merge, MERGES)
    return merge(size, tiling).astype(np.int64)


def most_tokens(tiling: Tiling) -> int:
    """Tokens of the image that takes most: one that fills its canvas has nothing left out."""
    return max(len(token_rows(canvas, tiling)) for canvas in tiling.canvases)


def _all_rows(size: Size, tiling: Tiling) -> Rows:
    views = np.arange(view_count(size, tiling)) * tiling.view_rows
    return (views[:, None] + np.arange(tiling.view_rows)).reshape(-1)


def _lines(size: Size, tiling: Tiling) -> Rows:
    return np.concatenate((np.arange(tiling.side**2), _canvas_rows(size, tiling).reshape(-1)))


def _unpadded_lines(size: Size, tiling: Tiling) -> Rows:
    shown = _canvas_rows(size, tiling)
    shown = shown[_unpadded(size, (shown.shape[1], shown.shape[0]), tiling.rounding)]
    ends = np.full((len(shown), 1), tiling.side**2)
    lines = np.concatenate((shown, ends), axis=1)
    return np.concatenate((np.arange(tiling.side**2), lines.reshape(-1)))


MERGES: Mapping[str, Callable[[Size, Tiling], Rows]] = MappingProxyType(
    {"views": _all_rows, "lines": _lines, "unpadded_lines": _unpadded_lines}
)
"""
- "views": all rows of all views.
- "lines": the first view, then the canvas line by line.
- "unpadded_lines": as "lines" without what shows padding, and a row that ends each line.
"""

ROUNDINGS: Mapping[str, Callable[[float], int]] = MappingProxyType(
    {"down": int, "down_after_7_digits": lambda value: int(round(value, 7))}
)


def _canvas_rows(size: Size, tiling: Tiling) -> Rows:
    """`[down, across]`: the row of each place of the whole canvas."""
    width, height = best_canvas(size, tiling.canvases)
    across, down, side = width // tiling.tile, height // tiling.tile, tiling.side
    y, x = np.mgrid[: down * side, : across * side]
    view = 1 + (y // side) * across + x // side
    rows: Rows = view * tiling.view_rows + (y % side) * side + x % side
    return rows


def _unpadded(size: Size, shown: Size, rounding: str) -> tuple[slice, slice]:
    """Lines and columns of `shown` that show the image; as much is cut at both ends."""
    whole = _known("rounding", rounding, ROUNDINGS)
    width, height = size
    if width / height > shown[0] / shown[1]:
        cut = (shown[1] - whole(height * (shown[0] / width))) // 2
        return slice(cut, shown[1] - cut), slice(None)
    cut = (shown[0] - whole(width * (shown[1] / height))) // 2
    return slice(None), slice(cut, shown[0] - cut)


def _known(what: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise EngineFormatError(
            f"The {what} that the engine asks for is unknown to this version.",
            found=repr(name),
            expected="one of: " + ", ".join(known),
            fix="install a newer vlmforge, or build the engine again",
        )
    return known[name]
