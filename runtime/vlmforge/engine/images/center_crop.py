"""Resize the shorter side, keep the centre."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct
from PIL import Image

from vlmforge.engine.fields import Side
from vlmforge.engine.images.pixels import Box, OneView, PixelFormat, PixelValues, Size, centre_box

MAX_RESIZED_PIXELS = 1 << 25
"""Above this, only the part of the resized image that the crop keeps is computed."""

_MAX_FILTER_SUPPORT = 3


class CenterCrop(OneView, Struct, frozen=True):
    """One view.

    Attributes:
        shortest_edge: Pixels of the shorter side after resizing.
        crop: Height and width of the centre crop; zeros fill what the image does not cover.
    """

    format: PixelFormat
    shortest_edge: Side
    crop: tuple[Side, Side]
    name: Literal["center_crop"] = "center_crop"

    def __str__(self) -> str:
        return f"{self.name} to {self.crop[1]}x{self.crop[0]}, {self.format.resample}"

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of a view."""
        return self.crop

    def pixels(self, rgb: Image.Image) -> PixelValues:
        """Pixel values `[1, 3, *crop]` of an RGB image."""
        size = shortest_edge_size(rgb.size, self.shortest_edge)
        box = centre_box(size, self.crop)
        if math.prod(size) > MAX_RESIZED_PIXELS:
            return self.format.values(_resize_window(rgb, size, box, self.format.filter))
        return self.format.values(rgb.resize(size, self.format.filter).crop(box))


def shortest_edge_size(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """`size` (width, height) scaled so that its shorter side is `edge`; the longer truncates."""
    width, height = size
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _resize_window(
    rgb: Image.Image, size: Size, box: Box, resample: Image.Resampling
) -> Image.Image:
    """`rgb.resize(size).crop(box)` without the pixels outside `box`; equal within one level.

    Only the source under the box, and as far around as the filter reaches, is resampled.
    """
    left, top = max(box[0], 0), max(box[1], 0)
    right, bottom = min(box[2], size[0]), min(box[3], size[1])
    x0, x1, columns = _source_span(left, right, rgb.width, size[0])
    y0, y1, rows = _source_span(top, bottom, rgb.height, size[1])
    window = rgb.crop((columns[0], rows[0], columns[1], rows[1])).resize(
        (right - left, bottom - top),
        resample,
        box=(x0 - columns[0], y0 - rows[0], x1 - columns[0], y1 - rows[0]),
    )
    canvas = Image.new("RGB", (box[2] - box[0], box[3] - box[1]))
    canvas.paste(window, (left - box[0], top - box[1]))
    return canvas


def _source_span(
    start: int, stop: int, length: int, resized: int
) -> tuple[float, float, tuple[int, int]]:
    """Source interval of the resized interval `start..stop`, and the pixels its filter reads."""
    scale = length / resized
    reach = math.ceil(_MAX_FILTER_SUPPORT * max(scale, 1.0)) + 1
    low, high = start * scale, stop * scale
    return low, high, (max(int(low) - reach, 0), min(math.ceil(high) + reach, length))
