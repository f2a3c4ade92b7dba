"""What all image policies do to pixels: Pillow's 8-bit resampling, then one table per channel.

Pixel parity is with the processors that resize with Pillow.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, NamedTuple, Self, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from PIL import Image

from vlmforge.engine.fields import ColourLevel, Divisor, Scale
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays, Grid, PatchInputs
from vlmforge.errors import ConfigError
from vlmforge.field_rules import Choice, Number

Colour: TypeAlias = tuple[ColourLevel, ColourLevel, ColourLevel]
"""RGB, 0 to 255."""

Size: TypeAlias = tuple[int, int]
"""Width and height."""

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom."""

PixelValues: TypeAlias = NDArray[np.float32]
"""`[views, 3, height, width]`."""

Rows: TypeAlias = NDArray[np.int64]
"""`[tokens]`: row r of view v is `v * rows of a view + r`."""

Layout: TypeAlias = tuple[str | int, ...]
"""An image in a prompt: texts, and numbers of its tokens, which follow each other in order."""


class PixelRange(NamedTuple):
    """The least and the most pixels that an image is brought to; None: as the engine has it."""

    least: int | None = None
    most: int | None = None


AS_ENGINE = PixelRange()

_FILTERS = {member.name.lower(): member for member in Image.Resampling}


class InViews:
    """What a policy answers whose vision part takes views of one size."""

    @property
    def patch_inputs(self) -> PatchInputs | None:
        """What the vision part takes instead of views; None: it takes views."""
        return None

    def grid(self, size: Size) -> Grid | None:
        """Tokens down and across of an image of this size; None: they are in no grid."""
        del size
        return None

    def arrays(self, grid: Grid) -> Arrays:
        """What the vision part takes beside an image's values."""
        del grid
        return NO_ARRAYS

    @property
    def chosen_at_load(self) -> frozenset[str]:
        """Names of what `within` changes of an engine: it is as good an engine with other ones."""
        return frozenset()

    def within(self, limits: PixelRange, tokens: int = 0) -> Self:
        """The policy with other limits of an image's pixels.

        `tokens` are what an image may take; 0: no more than by this policy.

        Raises:
            ConfigError: all images are brought to one size.
        """
        del tokens
        if limits == AS_ENGINE:
            return self
        raise ConfigError(
            "This engine's images have no limits of pixels to choose.",
            found=f"min_pixels {limits.least}, max_pixels {limits.most}",
            expected="neither: every image is brought to views of one size",
            fix="leave min_pixels and max_pixels out",
        )


class OneView(InViews):
    """What a policy answers whose every image is one view, and all its rows become tokens."""

    @property
    def sized(self) -> bool:
        """Whether the number of an image's tokens depends on its size."""
        return False

    def rows(self, size: Size) -> Rows | None:
        """The rows that become the tokens of an image of this size; None: all, in order."""
        del size
        return None

    def layout(self, size: Size, tokens: int) -> Layout:
        """What stands in a prompt for an image of this size and so many tokens."""
        del size
        return (tokens,)

    def most_tokens(self, rows: int) -> int:
        """Tokens of the image that takes most; `rows` are what the vision part gives a view."""
        return rows

    def view_rows(self, most_tokens: int) -> int:
        """What the vision part gives a view, of an engine whose largest image takes so many."""
        return most_tokens


class PixelFormat(Struct, frozen=True):
    """How pixels become values.

    Attributes:
        resample: A filter of Pillow, in lower case ("bicubic", ...).
        rescale_factor: Multiplies the 8-bit levels.
        mean: Subtracted after rescaling, per channel.
        std: Divides after that, per channel.
        background: RGB under transparent pixels. None: transparency is left out of account, as it
            was when most models were trained.
    """

    resample: Annotated[str, Choice(tuple(_FILTERS))]
    rescale_factor: Annotated[float, Number(0, 1e6, above=True)]
    mean: tuple[Scale, Scale, Scale]
    std: tuple[Divisor, Divisor, Divisor]
    background: Colour | None = None

    @property
    def filter(self) -> Image.Resampling:
        """The filter as Pillow has it."""
        return _FILTERS[self.resample]

    def values(self, rgb: Image.Image) -> PixelValues:
        """`(level * rescale_factor - mean) / std` of one view, rounded as the originals round.

        They rescale in float64, cast to float32 and normalise in float32; there are only 256
        levels.
        """
        pixels = np.asarray(rgb)
        found = np.empty((1, 3, *pixels.shape[:2]), np.float32)
        for channel, table in enumerate(_tables(self)):
            # "clip", which no level needs, spares a copy: four times as fast as indexing.
            np.take(table, pixels[..., channel], out=found[0, channel], mode="clip")
        return found


@lru_cache(maxsize=16)
def _tables(pixels: PixelFormat) -> NDArray[np.float32]:
    """The values of all levels `[3, 256]`."""
    levels = (np.arange(256, dtype=np.float64) * pixels.rescale_factor).astype(np.float32)
    mean, std = np.array(pixels.mean, np.float32), np.array(pixels.std, np.float32)
    return np.ascontiguousarray(((levels[:, None] - mean) / std).T)


def centre_box(size: Size, crop: tuple[int, int]) -> Box:
    """The centre of an image, `crop` (height, width) large.

    Where that is larger than the image the box starts below 0, and Pillow fills zeros.
    """
    width, height = size
    crop_height, crop_width = crop
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
