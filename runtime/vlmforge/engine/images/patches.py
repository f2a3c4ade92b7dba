"""Images of any resolution: resized to whole patches within limits, each patch a row of values.

The arithmetic is that of `smart_resize`, as the published processors have it, and of transformers'
Pillow processors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from msgspec import Struct, structs
from PIL import Image
from typing_extensions import override

from vlmforge.engine.fields import MOST_TOKENS
from vlmforge.engine.images.patch_inputs import (
    Arrays,
    Grid,
    PatchInputs,
    interpolation,
    turns,
    windows,
)
from vlmforge.engine.images.pixels import Layout, PixelFormat, PixelRange, PixelValues, Rows, Size
from vlmforge.engine.positions.absolute import Frequency
from vlmforge.engine.schema import Agreeing
from vlmforge.errors import ConfigError, ImageError
from vlmforge.field_rules import Int

MOST_RATIO = 200
"""Of the longer side to the shorter one, as the published processors have it."""

PatchSide = Annotated[int, Int(1, 1 << 10)]
PixelCount = Annotated[int, Int(1, 1 << 40)]
TableSide = Annotated[int, Int(0, 1 << 12)]


class Patches(Agreeing, Struct, frozen=True):
    """How an image becomes patches, `merge * merge` of which become a token.

    Attributes:
        patch: Side of a patch in pixels.
        frames: Images of a patch, for parts that see films: a single image is all of them.
        merge: Side of a token in patches.
        min_pixels, max_pixels: Smaller and larger images are resized until they are within.
        inverse_frequencies: Radians a patch, of the angles that it is turned by in each direction.
        window: Side of the windows of the attention in tokens; 0: it has none.
        table: Side of the table of places that is interpolated; 0: there is none.
    """

    format: PixelFormat
    patch: PatchSide
    frames: Annotated[int, Int(1, 64)]
    merge: Annotated[int, Int(1, 64)]
    min_pixels: PixelCount
    max_pixels: PixelCount
    inverse_frequencies: tuple[Frequency, ...]
    window: TableSide = 0
    table: TableSide = 0
    name: Literal["patches"] = "patches"

    @override
    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.min_pixels > self.max_pixels:
            yield "min_pixels", "at most max_pixels"
        if not self.inverse_frequencies:
            yield "inverse_frequencies", "some"
        if self.most_tokens(0) > MOST_TOKENS:
            yield "max_pixels", f"so few that an image has at most {MOST_TOKENS} tokens"

    def __str__(self) -> str:
        unit = self._unit
        limits = f"{self.min_pixels} to {self.max_pixels} pixels"
        return f"{self.name} of {limits}, a token for {unit}x{unit}, {self.format.resample}"

    @property
    def _unit(self) -> int:
        """Side of a token in pixels."""
        return self.patch * self.merge

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of what becomes a token: an image has as many as its size asks for."""
        return self._unit, self._unit

    @property
    def sized(self) -> bool:
        """True: larger images have more tokens."""
        return True

    @property
    def patch_inputs(self) -> PatchInputs:
        """What the vision part takes."""
        return PatchInputs(
            self.merge**2,
            3 * self.frames * self.patch**2,
            2 * len(self.inverse_frequencies),
            self.window**2,
            self.table > 0,
        )

    def pixels(self, rgb: Image.Image) -> PixelValues:
        """Values `[1, tokens, merge * merge, 3 * frames * patch * patch]` of an RGB image.

        Raises:
            ImageError: its sides differ too much.
        """
        down, across = self.grid(rgb.size)
        size = across * self._unit, down * self._unit
        values = self.format.values(rgb.resize(size, self.format.filter))[0]
        merge, patch = self.merge, self.patch
        cut = values.reshape(3, down, merge, patch, across, merge, patch)
        cut = cut.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        shape = (*cut.shape[:5], self.frames, patch, patch)
        return np.broadcast_to(cut, shape).reshape(1, down * across, merge**2, -1)

    def grid(self, size: Size) -> Grid:
        """Tokens down and across of an image of this size (ImageError: sides that differ too much).

        An image gives `grid[0] * grid[1]` tokens, row by row.
        """
        width, height = size
        if max(size) > MOST_RATIO * min(size):
            raise ImageError(
                "The image is too narrow for this model.",
                found=f"{width} x {height} pixels",
                expected=f"a longer side of at most {MOST_RATIO} times the shorter one",
                fix="crop it, or put it on a background",
            )
        unit = self._unit
        down, across = round(height / unit), round(width / unit)
        if down * across * unit**2 > self.max_pixels:
            beta = math.sqrt((height * width) / self.max_pixels)
            return max(1, math.floor(height / beta / unit)), max(1, math.floor(width / beta / unit))
        if down * across * unit**2 < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * beta / unit), math.ceil(width * beta / unit)
        return down, across

    def rows(self, size: Size) -> Rows | None:
        """All rows of the vision part, in order."""
        down, across = self.grid(size)
        return np.arange(down * across, dtype=np.int64)

    def layout(self, size: Size, tokens: int) -> Layout:
        """All tokens, and no texts."""
        del size
        return (tokens,)

    def arrays(self, grid: Grid) -> Arrays:
        """What the vision part takes beside the patches, of images of this grid."""
        return {
            **turns(grid, self.merge, self.inverse_frequencies),
            **(windows(grid, self.window) if self.window else {}),
            **(interpolation(grid, self.merge, self.table) if self.table else {}),
        }

    @property
    def chosen_at_load(self) -> frozenset[str]:
        """Its limits of pixels, and with them the most tokens of an image."""
        return frozenset(("min_pixels", "max_pixels", "tokens_per_image"))

    def within(self, limits: PixelRange, tokens: int = 0) -> Patches:
        """The policy with other limits of an image's pixels.

        `tokens` are what an image may take; 0: no more than by this policy.

        Raises:
            ConfigError: no image could be within both, or it would take more tokens than it may.
        """
        low, high = limits.least or self.min_pixels, limits.most or self.max_pixels
        most = max(self.max_pixels, min(tokens, MOST_TOKENS) * self._unit**2)
        if high > most:
            raise ConfigError(
                "The limits of an image's pixels let it be larger than it may be here.",
                found=f"max_pixels {high}",
                expected=f"at most {most}, which are {most // self._unit**2} tokens",
                fix="lower it; VisionConfig(max_pixels=...) is the most for messages, and what "
                "EngineConfig(session_len=...) holds the most for that",
            )
        if not self._unit**2 <= high or low > high:
            raise ConfigError(
                "The limits of an image's pixels leave no size.",
                found=f"min_pixels {low}, max_pixels {high}",
                expected=f"min_pixels up to max_pixels, and that at least {self._unit**2}",
                fix="set both, min_pixels too, or leave both out",
            )
        return structs.replace(self, min_pixels=low, max_pixels=high)

    def most_tokens(self, rows: int) -> int:
        """More than any image takes: of the largest, of one line, and of small ones rounded up."""
        del rows
        most, least = self.max_pixels / self._unit**2, self.min_pixels / self._unit**2
        line = math.sqrt(MOST_RATIO * most)
        rounded = least + 2 * math.sqrt(MOST_RATIO * least) + 1
        return max(1, math.floor(max(most, line, rounded)))

    def view_rows(self, most_tokens: int) -> int:
        """One: what becomes a token is a view of its own."""
        del most_tokens
        return 1
