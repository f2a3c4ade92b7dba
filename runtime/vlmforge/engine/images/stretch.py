"""Squeeze the whole image to one size, whatever its aspect ratio."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from PIL import Image

from vlmforge.engine.fields import Side
from vlmforge.engine.images.pixels import OneView, PixelFormat, PixelValues


class Stretch(OneView, Struct, frozen=True):
    """One view. `target` is its height and width."""

    format: PixelFormat
    target: tuple[Side, Side]
    name: Literal["stretch"] = "stretch"

    def __str__(self) -> str:
        return f"{self.name} to {self.target[1]}x{self.target[0]}, {self.format.resample}"

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of a view."""
        return self.target

    def pixels(self, rgb: Image.Image) -> PixelValues:
        """Pixel values `[1, 3, *target]` of an RGB image."""
        height, width = self.target
        return self.format.values(rgb.resize((width, height), self.format.filter))
