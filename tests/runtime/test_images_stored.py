"""Images as plain data and back: equal pixels, equal digests, in every mode and format."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from PIL import Image

from image_files import encoded
from vlmforge.engine.schema import from_json, parse_json, to_json
from vlmforge.errors import ImageError
from vlmforge.vl.decode import to_rgb
from vlmforge.vl.image_limits import DEFAULT_LIMITS, FORMATS
from vlmforge.vl.load import OpenedImage, open_image, reopen
from vlmforge.vl.stored import Pixels

LIMITS = structs.replace(DEFAULT_LIMITS, formats=FORMATS)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8))


def check(opened: OpenedImage) -> None:
    """Through JSON, as a file would keep it; and once more."""
    once = opened
    for _ in range(2):
        stored = once.stored()
        if stored.pixels is not None:
            kept = from_json(Pixels, parse_json(to_json(stored.pixels)), "pixels")
            stored = structs.replace(stored, pixels=kept)
        once = reopen(stored, name=opened.name, limits=LIMITS)
    assert (once.digest, once.size, once.name) == (opened.digest, opened.size, opened.name)
    found, expected = once.decode(), opened.decode()
    assert (found.mode, found.size) == (expected.mode, expected.size)
    for background in (None, (9, 99, 200)):
        assert to_rgb(found, background).tobytes() == to_rgb(expected, background).tobytes()


def with_transparency(mode: str, transparency: Any) -> Image.Image:
    image = PICTURE.convert("RGB").convert(mode)
    image.info["transparency"] = transparency
    return image


def with_orientation(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


MODES = ("1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


@pytest.mark.parametrize("mode", MODES)
def test_pixels_of_every_mode(mode: str) -> None:
    way = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}.get(mode, "RGB")
    check(open_image(PICTURE.convert(way).convert(mode)))


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_deep_pixels(mode: str) -> None:
    levels = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800
    image = Image.fromarray(levels)
    check(open_image(image if mode == "I;16" else image.convert("I").convert(mode)))


@pytest.mark.parametrize(
    "image",
    [
        with_transparency("P", 3),
        with_transparency("P", bytes(range(0, 250, 5))),
        with_transparency("RGB", (10, 20, 30)),
        with_transparency("L", 77),
    ],
    ids=["index", "levels", "colour", "grey"],
)
def test_what_is_transparent_stays_so(image: Image.Image) -> None:
    check(open_image(image))


@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 8])
def test_pixels_that_are_to_be_turned(orientation: int) -> None:
    image = PICTURE.copy()
    image.info["exif"] = with_orientation(image, orientation)
    check(open_image(image))


@pytest.mark.parametrize("orientation", [None, 1, 6])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "AVIF"])
def test_files_of_every_format(name: str, orientation: int | None) -> None:
    if name == "QOI":
        data = b"qoif\0\0\0\1\0\0\0\1\3\0\xfe\1\2\3" + b"\0" * 7 + b"\1"
    else:
        takes = name in ("PNG", "JPEG", "WEBP", "TIFF") and orientation is not None
        options = {"exif": with_orientation(PICTURE, orientation or 1)} if takes else {}
        data = encoded(PICTURE.convert("RGB"), name, **options)
    check(open_image(data, limits=LIMITS))


def test_a_name_is_kept() -> None:
    image = PICTURE.copy()
    image.filename = "cat.png"  # type: ignore[attr-defined]
    check(open_image(image))


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "XYZ"},
        {"size": (7, 500)},
        {"size": (-1, 5)},
        {"size": (1 << 40, 1 << 40)},
        {"transparency": "levels", "transparent": (1, 999)},
        {"transparency": "level"},
    ],
)
def test_made_up_pixels_are_refused(change: dict[str, Any]) -> None:
    stored = open_image(PICTURE).stored()
    assert stored.pixels is not None
    wrong = structs.replace(stored, pixels=structs.replace(stored.pixels, **change))
    with pytest.raises(ImageError, match="Stored pixels"):
        reopen(wrong, name=None)


def test_what_is_too_large_is_refused_before_it_is_decoded() -> None:
    stored = open_image(encoded(Image.new("RGB", (200, 100)), "PNG")).stored()
    few = structs.replace(DEFAULT_LIMITS, max_pixels=100)
    for kept in (stored, open_image(Image.new("RGB", (200, 100))).stored()):
        with pytest.raises(ImageError, match="too many pixels"):
            reopen(kept, name=None, limits=few)
    assert io.BytesIO(stored.data).read(4) == b"\x89PNG"
