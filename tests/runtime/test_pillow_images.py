"""Pixels in pieces are the pixels, of every mode and of widths that no piece divides."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlmforge.vl.load import open_image
from vlmforge.vl.pillow_images import pixel_bytes

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "size", [(1, 1), (7, 3), (1300, 1000), (3, 450_000), (400_000, 2)], ids=str
)
def test_pieces_are_the_whole(mode: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    plain = mode in ("PA", "I;16")  # to which nothing is converted
    image = Image.new(mode, size, 3) if plain else Image.fromarray(noise).convert(mode)
    length, pieces = pixel_bytes(image)
    found, whole = list(pieces), image.tobytes()
    assert b"".join(found) == whole
    assert length == len(whole)
    row = len(whole) // size[1]
    assert max(map(len, found)) <= max(row, 1 << 20)


@pytest.mark.parametrize("place", [(0, 0), (641, 500), (1299, 999)])
def test_a_large_picture_is_another_where_any_pixel_is(place: tuple[int, int]) -> None:
    """Whichever of its pieces that is in; the same pixels are the same picture."""
    pixels = np.zeros((1000, 1300, 3), np.uint8)
    digest = open_image(pixels).digest
    assert len(digest) == 16
    assert open_image(Image.fromarray(pixels)).digest == digest
    pixels[place[1], place[0], 2] = 1
    assert open_image(pixels).digest != digest
