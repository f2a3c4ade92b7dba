"""Images of any resolution: the whole image squeezed to a tile, then the tiles of its canvas."""

from __future__ import annotations

from typing import Literal

import numpy as np
from msgspec import Struct
from PIL import Image

from vlmforge.engine.images.pixels import InViews, Layout, PixelFormat, PixelValues, Rows, Size
from vlmforge.engine.images.tiling import (
    Tiling,
    best_canvas,
    fitted_size,
    most_tokens,
    tile_boxes,
    token_rows,
)


class AnyRes(InViews, Struct, frozen=True):
    """Views of one size; which of their rows become tokens follows from the image's size."""

    format: PixelFormat
    tiling: Tiling
    name: Literal["anyres"] = "anyres"

    def __str__(self) -> str:
        tile = self.tiling.tile
        canvases = ", ".join(f"{width}x{height}" for width, height in self.tiling.canvases)
        return f"{self.name} in views of {tile}x{tile} from {canvases}, {self.format.resample}"

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of a view."""
        return self.tiling.tile, self.tiling.tile

    def pixels(self, rgb: Image.Image) -> PixelValues:
        """Pixel values `[views, 3, tile, tile]` of an RGB image."""
        tiling = self.tiling
        size = best_canvas(rgb.size, tiling.canvases)
        fitted = rgb.resize(fitted_size(rgb.size, size), self.format.filter)
        canvas = Image.new("RGB", size, tiling.fill)
        canvas.paste(fitted, ((size[0] - fitted.width) // 2, (size[1] - fitted.height) // 2))
        views = [rgb.resize((tiling.tile, tiling.tile), self.format.filter)]
        views += [canvas.crop(box) for box in tile_boxes(size, tiling.tile)]
        return np.concatenate([self.format.values(view) for view in views])

    @property
    def sized(self) -> bool:
        """True: larger images have more views."""
        return True

    def rows(self, size: Size) -> Rows | None:
        """The rows of an image of this size, in the order of their tokens."""
        return token_rows(size, self.tiling)

    def layout(self, size: Size, tokens: int) -> Layout:
        """All tokens, and no texts."""
        del size
        return (tokens,)

    def most_tokens(self, rows: int) -> int:
        """Tokens of the image that takes most."""
        del rows
        return most_tokens(self.tiling)

    def view_rows(self, most_tokens: int) -> int:
        """What the vision part gives a view."""
        del most_tokens
        return self.tiling.view_rows
