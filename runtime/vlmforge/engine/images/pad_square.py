"""Centre on a square, resize the square, keep its centre."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from PIL import Image

from vlmforge.engine.fields import Side
from vlmforge.engine.images.pixels import Colour, OneView, PixelFormat, PixelValues, centre_box
from vlmforge.errors import ImageError

MAX_SQUARE_SIDE = 1 << 15
"""Longest side of an image that may be padded to a square."""

_BAND_PIXELS = 1 << 22


class PadSquare(OneView, Struct, frozen=True):
    """One view.

    Attributes:
        shortest_edge: Pixels of the square's sides after resizing.
        crop: Height and width of the centre crop; zeros fill what the square does not cover.
        pad_fill: RGB of the padding.
    """

    format: PixelFormat
    shortest_edge: Side
    crop: tuple[Side, Side]
    pad_fill: Colour
    name: Literal["pad_square"] = "pad_square"

    def __str__(self) -> str:
        return f"{self.name} to {self.crop[1]}x{self.crop[0]}, {self.format.resample}"

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of a view."""
        return self.crop

    def pixels(self, rgb: Image.Image) -> PixelValues:
        """Pixel values `[1, 3, *crop]` of an RGB image (ImageError: too long for a square)."""
        square = _padded_square(rgb, self.shortest_edge, self.format.filter, self.pad_fill)
        return self.format.values(square.crop(centre_box(square.size, self.crop)))


def _padded_square(
    rgb: Image.Image, edge: int, resample: Image.Resampling, fill: Colour
) -> Image.Image:
    """Pad to a centred square and resize it to `edge`, without the whole square in memory.

    Pillow resamples rows first and then columns. Doing the rows band by band, and leaving out
    those that are all `fill`, gives the same pixels.
    """
    side = max(rgb.size)
    if side > MAX_SQUARE_SIDE:
        raise ImageError(
            "An image is too long to be padded to a square.",
            found=f"{rgb.width} x {rgb.height} pixels, aspect ratio {side / min(rgb.size):.0f}:1",
            expected=f"sides of at most {MAX_SQUARE_SIDE} pixels",
            fix="cut the image into parts, or resize it",
        )
    left, top = (side - rgb.width) // 2, (side - rgb.height) // 2
    strip = Image.new("RGB", (edge, side), fill)
    rows = max(_BAND_PIXELS // side, 1)
    for y in range(0, rgb.height, rows):
        part = rgb.crop((0, y, rgb.width, min(y + rows, rgb.height)))
        band = Image.new("RGB", (side, part.height), fill)
        band.paste(part, (left, 0))
        strip.paste(band.resize((edge, part.height), resample), (0, top + y))
    return strip.resize((edge, edge), resample)
