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
from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

import numpy as np
from msgspec import Struct
from typing_extensions import override

from vlmforge.engine.fields import MOST_TOKENS, ImageTokens, Pixels, Side
from vlmforge.engine.images.pixels import Box, Colour, Rows, Size
from vlmforge.engine.schema import Agreeing
from vlmforge.field_rules import Int


class Views(Struct, frozen=True):
    """All rows of all views."""

    name: Literal["views"] = "views"


class Lines(Struct, frozen=True):
    """The first view, then the canvas line by line."""

    name: Literal["lines"] = "lines"


class UnpaddedLines(Struct, frozen=True):
    """As `Lines` without what shows padding, and a row that ends each line.

    `digits`: the size without padding is rounded to so many digits before it is cut to a whole
    number; None: it is only cut.
    """

    digits: Annotated[int, Int(0, 15)] | None = None
    name: Literal["unpadded_lines"] = "unpadded_lines"


Merge: TypeAlias = Views | Lines | UnpaddedLines


class Tiling(Agreeing, Struct, frozen=True):
    """How an image is cut into views, and which of their rows become tokens.

    Attributes:
        tile: Side of a view in pixels.
        canvases: Sizes (width, height) to choose from, multiples of `tile`; the first wins a tie.
        fill: RGB of the canvas around the image.
        side: Rows of a view along one side: the vision part gives each view `side * side` rows for
            its pixels.
        view_rows: All rows that it gives each view. Those beyond `side * side` are the same for
            every view; `UnpaddedLines` ends its lines with the first of them.
        merge: What becomes of the rows.
    """

    tile: Side
    canvases: tuple[tuple[Pixels, Pixels], ...]
    fill: Colour
    side: Side
    view_rows: ImageTokens
    merge: Merge

    @override
    def disagreements(self) -> Iterator[tuple[str, str]]:
        tile, canvases = self.tile, self.canvases
        whole = all(width % tile == 0 == height % tile for width, height in canvases)
        if not canvases or not whole:
            yield "canvases", "some, multiples of the tile"
        if self.view_rows < self.side**2 + isinstance(self.merge, UnpaddedLines):
            yield "view_rows", "at least side x side"
        views = max(((width // tile) * (height // tile) for width, height in canvases), default=0)
        if (1 + views) * self.view_rows > MOST_TOKENS:
            yield "view_rows", f"views of at most {MOST_TOKENS} rows in all"


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
    """The rows that become the tokens of an image of this size, in order (`view_rows` a view)."""
    match tiling.merge:
        case Views():
            rows = np.arange(view_count(size, tiling) * tiling.view_rows)
        case Lines():
            rows = np.concatenate((_whole_image(tiling), _canvas_rows(size, tiling).reshape(-1)))
        case UnpaddedLines(digits=digits):
            shown = _canvas_rows(size, tiling)
            shown = shown[_unpadded(size, (shown.shape[1], shown.shape[0]), digits)]
            ends = np.full((len(shown), 1), tiling.side**2)
            lines = np.concatenate((shown, ends), axis=1)
            rows = np.concatenate((_whole_image(tiling), lines.reshape(-1)))
    return rows.astype(np.int64)


def most_tokens(tiling: Tiling) -> int:
    """Tokens of the image that takes most: one that fills its canvas has nothing left out."""
    return max(len(token_rows(canvas, tiling)) for canvas in tiling.canvases)


def _whole_image(tiling: Tiling) -> Rows:
    return np.arange(tiling.side**2)


def _canvas_rows(size: Size, tiling: Tiling) -> Rows:
    """`[down, across]`: the row of each place of the whole canvas."""
    width, height = best_canvas(size, tiling.canvases)
    across, down, side = width // tiling.tile, height // tiling.tile, tiling.side
    y, x = np.mgrid[: down * side, : across * side]
    view = 1 + (y // side) * across + x // side
    rows: Rows = view * tiling.view_rows + (y % side) * side + x % side
    return rows


def _unpadded(size: Size, shown: Size, digits: int | None) -> tuple[slice, slice]:
    """Lines and columns of `shown` that show the image; as much is cut at both ends."""
    width, height = size
    if width / height > shown[0] / shown[1]:
        cut = (shown[1] - _whole(height * (shown[0] / width), digits)) // 2
        return slice(cut, shown[1] - cut), slice(None)
    cut = (shown[0] - _whole(width * (shown[1] / height), digits)) // 2
    return slice(None), slice(cut, shown[0] - cut)


def _whole(length: float, digits: int | None) -> int:
    return int(length if digits is None else round(length, digits))
