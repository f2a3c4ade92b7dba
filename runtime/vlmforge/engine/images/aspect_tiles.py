"""Images of any resolution: squeezed to a grid of tiles of the nearest aspect ratio, then whole.

The arithmetic, its floating point included, is that of `get_optimal_tiled_canvas` and
`crop_image_to_patches` of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import numpy as np
from msgspec import Struct
from PIL import Image
from typing_extensions import override

from vlmforge.engine.fields import MOST_TOKENS, ImageTokens, Side, Tiles
from vlmforge.engine.images.pixels import InViews, Layout, PixelFormat, PixelValues, Rows, Size
from vlmforge.engine.images.tiling import tile_boxes
from vlmforge.engine.schema import Agreeing


class AspectTiles(InViews, Agreeing, Struct, frozen=True):
    """The tiles row by row; behind them, if there are several, the whole image squeezed to one.

    Attributes:
        format: How pixels become values.
        tile: Side of a view in pixels.
        least, most: Tiles of an image, the whole one not counted.
        view_tokens: Rows that the vision part gives a view; all become tokens.
        begin, end: Texts around the tokens of an image.
    """

    format: PixelFormat
    tile: Side
    least: Tiles
    most: Tiles
    view_tokens: ImageTokens
    begin: str
    end: str
    name: Literal["aspect_tiles"] = "aspect_tiles"

    def __str__(self) -> str:
        tiles = f"{self.least} to {self.most} tiles of {self.tile}x{self.tile}"
        return f"{self.name}, {tiles}, {self.format.resample}"

    @override
    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.least > self.most:
            yield "least", "at most `most`"
        if (1 + self.most) * self.view_tokens > MOST_TOKENS:
            yield "view_tokens", f"views of at most {MOST_TOKENS} rows in all"

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of a view."""
        return self.tile, self.tile

    def grid(self, size: Size) -> Size:
        """Columns and rows of the tiles of an image of this size.

        Of grids that are as near to its aspect ratio the largest whose tiles have less than twice
        the image's pixels.
        """
        width, height = size
        ratio, area = width / height, width * height
        nearest, best = float("inf"), (1, 1)
        for columns, rows in _grids(self.least, self.most):
            difference = abs(ratio - columns / rows)
            enough = area > 0.5 * self.tile * self.tile * columns * rows
            if difference < nearest or (difference == nearest and enough):
                nearest, best = difference, (columns, rows)
        return best

    def pixels(self, rgb: Image.Image) -> PixelValues:
        """Pixel values `[views, 3, tile, tile]` of an RGB image."""
        columns, rows = self.grid(rgb.size)
        canvas = (columns * self.tile, rows * self.tile)
        resized = rgb.resize(canvas, self.format.filter)
        views = [resized.crop(box) for box in tile_boxes(canvas, self.tile)]
        if len(views) > 1:
            views.append(rgb.resize((self.tile, self.tile), self.format.filter))
        return np.concatenate([self.format.values(view) for view in views])

    @property
    def sized(self) -> bool:
        """True: the aspect ratio decides on the views."""
        return True

    def rows(self, size: Size) -> Rows | None:
        """All rows of all views."""
        columns, rows = self.grid(size)
        tiles = columns * rows
        return np.arange((tiles + (tiles > 1)) * self.view_tokens, dtype=np.int64)

    def layout(self, size: Size, tokens: int) -> Layout:
        """The tokens between the two texts."""
        del size
        return self.begin, tokens, self.end

    def most_tokens(self, rows: int) -> int:
        """Tokens of the image that takes most: a strip of as many tiles as there may be."""
        del rows
        return (self.most + (self.most > 1)) * self.view_tokens

    def view_rows(self, most_tokens: int) -> int:
        """What the vision part gives a view."""
        del most_tokens
        return self.view_tokens


@lru_cache(maxsize=16)
def _grids(least: int, most: int) -> tuple[Size, ...]:
    """Columns and rows of all grids, smaller ones first, of equals those of fewer columns."""
    sides = range(1, most + 1)
    grids = [(x, y) for x in sides for y in sides if least <= x * y <= most]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))
