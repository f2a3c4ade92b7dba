"""Images of any resolution: resized to a longest edge, cut into a grid of tiles, then whole.

The arithmetic, its floating point included, is that of `get_resize_output_image_size`,
`resize_for_vision_encoder` and `split_images` of transformers, and the texts are where its
`get_image_prompt_string` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from msgspec import Struct
from PIL import Image
from typing_extensions import override

from vlmforge.engine.fields import MOST_TOKENS, ImageTokens, Pixels, Side
from vlmforge.engine.images.pixels import InViews, Layout, PixelFormat, PixelValues, Rows, Size
from vlmforge.engine.images.tiling import tile_boxes
from vlmforge.engine.schema import Agreeing

_LONGEST = 4096  # the processors' `MAX_IMAGE_SIZE`


class GridTexts(Struct, frozen=True):
    """What is written around the tokens of an image's views.

    Attributes:
        tile: Before each tile's tokens; `{row}` and `{column}` count from 1.
        line: Behind each row of tiles.
        whole: Before the tokens of the whole image that follows its tiles.
        alone: Before the tokens of an image that has no tiles.
        end: Behind an image.
    """

    tile: str
    line: str
    whole: str
    alone: str
    end: str


class GridTiles(InViews, Agreeing, Struct, frozen=True):
    """The tiles row by row, then the whole image squeezed to one; a small one is whole only.

    Attributes:
        format: How pixels become values.
        tile: Side of a view in pixels.
        longest_edge: Pixels that the longer side is resized to before it is cut.
        splits: False cuts nothing: every image is one view.
        view_tokens: Rows that the vision part gives a view; all become tokens.
        texts: What is written around them.
    """

    format: PixelFormat
    tile: Side
    longest_edge: Pixels
    splits: bool
    view_tokens: ImageTokens
    texts: GridTexts
    name: Literal["grid_tiles"] = "grid_tiles"

    def __str__(self) -> str:
        cut = f"tiles of {self.tile}x{self.tile} of a longest edge of {self.longest_edge}"
        whole = f"one view of {self.tile}x{self.tile}"
        return f"{self.name}, {cut if self.splits else whole}, {self.format.resample}"

    @override
    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.most_tokens(0) > MOST_TOKENS:
            yield "view_tokens", f"views of at most {MOST_TOKENS} rows in all"

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of a view."""
        return self.tile, self.tile

    def grid(self, size: Size) -> Size:
        """Columns and rows of the tiles of an image of this size; (0, 0): it is whole only."""
        width, height = self._canvas(self._resized(size))
        if not self.splits or (width <= self.tile and height <= self.tile):
            return 0, 0
        return width // self.tile, height // self.tile

    def pixels(self, rgb: Image.Image) -> PixelValues:
        """Pixel values `[views, 3, tile, tile]` of an RGB image."""
        resized = rgb.resize(self._resized(rgb.size), self.format.filter)
        views = []
        if self.splits:
            resized = resized.resize(self._canvas(resized.size), self.format.filter)
            if self.grid(rgb.size) != (0, 0):
                views = [resized.crop(box) for box in tile_boxes(resized.size, self.tile)]
        views.append(resized.resize((self.tile, self.tile), self.format.filter))
        return np.concatenate([self.format.values(view) for view in views])

    def _resized(self, size: Size) -> Size:
        width, height = size
        ratio = width / height
        if width >= height:
            width, height = self.longest_edge, int(self.longest_edge / ratio)
            height += height % 2
        else:
            width, height = int(self.longest_edge * ratio), self.longest_edge
            width += width % 2
        return _at_most((max(width, 1), max(height, 1)), _LONGEST)

    def _canvas(self, size: Size) -> Size:
        """The size of the grid's tiles together."""
        width, height = size
        ratio, tile = width / height, self.tile
        if width >= height:
            width = math.ceil(width / tile) * tile
            height = math.ceil(int(width / ratio) / tile) * tile
        else:
            height = math.ceil(height / tile) * tile
            width = math.ceil(int(height * ratio) / tile) * tile
        return width, height

    @property
    def sized(self) -> bool:
        """True: the aspect ratio decides on the views."""
        return True

    def rows(self, size: Size) -> Rows | None:
        """All rows of all views."""
        columns, rows = self.grid(size)
        return np.arange((columns * rows + 1) * self.view_tokens, dtype=np.int64)

    def layout(self, size: Size, tokens: int) -> Layout:
        """Each view's tokens behind their text."""
        del tokens
        (columns, rows), texts, count = self.grid(size), self.texts, self.view_tokens
        if not columns:
            return texts.alone, count, texts.end
        pieces: list[str | int] = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                text = texts.tile.replace("{row}", str(row)).replace("{column}", str(column))
                pieces += [text, count]
            pieces.append(texts.line)
        return (*pieces, texts.whole, count, texts.end)

    def most_tokens(self, rows: int) -> int:
        """Tokens of the image that takes most: a square one."""
        del rows
        columns, down = self.grid((1, 1))
        return (columns * down + 1) * self.view_tokens

    def view_rows(self, most_tokens: int) -> int:
        """What the vision part gives a view."""
        del most_tokens
        return self.view_tokens


def _at_most(size: Size, longest: int) -> Size:
    width, height = size
    ratio = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / ratio)
    elif height > width and height > longest:
        width, height = int(longest * ratio), longest
    return max(width, 1), max(height, 1)
