"""Bytes to whole, upright images within limits, and images to RGB."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image

from vlmforge.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "QOI")
"""Raster formats that are decoded in this process; none that runs another program (as EPS does)."""

_Factory = Callable[[IO[bytes], str | bytes], Image.Image]

_NOT_THIS_FORMAT = (SyntaxError, IndexError, TypeError, struct.error)
_BAD_METADATA = (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error)

_ORIENTATION_TAG = 0x0112
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_SIDEWAYS = (5, 6, 7, 8)

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may cost.

    Attributes:
        max_pixels: Width times height.
        max_bytes: Size of the encoded file.
        timeout_s: Seconds that a fetch may take in all.
        max_redirects: Redirects that a fetch follows.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 64 * 1024 * 1024
    timeout_s: float = 10.0
    max_redirects: int = 3


DEFAULT_LIMITS = ImageLimits()


def decode_image(data: bytes, *, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode `data`: the first frame, upright, in the file's own mode.

    Args:
        data: A file of one of `FORMATS`.
        name: What error messages call it.
        limits: Checked against the header, before any pixel is decoded.

    Raises:
        ImageError: empty, not an image, truncated, damaged, or over a limit.
    """
    image = open_header(data, name=name, limits=limits)
    load_pixels(image, name=name)
    return upright(image)


def open_header(data: bytes, *, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read the header of `data` and check it against `limits`; no pixel is decoded.

    Raises:
        ImageError: empty, not an image, a damaged header, or over a limit.
    """
    check_byte_count(len(data), name=name, limits=limits)
    if not data:
        raise ImageError(
            f"{name} is empty.",
            found="0 bytes",
            expected="an image file",
            fix="check that the file was written or downloaded completely",
        )
    image = _open(data, name)
    check_size(image.size, name=name, limits=limits)
    return image


def check_byte_count(count: int, *, name: str, limits: ImageLimits) -> None:
    """Raise ImageError when a file of `count` bytes is too large."""
    if count > limits.max_bytes:
        raise ImageError(
            f"{name} is too large.",
            found=f"{count} bytes",
            expected=f"at most {limits.max_bytes} bytes",
            fix="send a smaller file",
        )


def check_size(size: tuple[int, int], *, name: str, limits: ImageLimits) -> None:
    """Raise ImageError when `size` (width, height) is empty or has too many pixels."""
    width, height = size
    if not 0 < width * height <= limits.max_pixels:
        raise ImageError(
            f"{name} has {'too many' if width * height else 'no'} pixels.",
            found=f"{width} x {height} = {width * height} pixels",
            expected=f"1 to {limits.max_pixels} pixels",
            fix="resize the image",
        )


def load_pixels(image: Image.Image, *, name: str) -> None:
    """Decode the pixels of an opened image in place (ImageError when they are not whole)."""
    try:
        image.load()
    except Exception as error:  # Decoders of untrusted bytes raise nearly anything.
        raise _damaged(name, str(error)) from error


def upright(image: Image.Image) -> Image.Image:
    """A copy with its EXIF orientation applied and the tag dropped.

    Metadata that cannot be read holds no orientation: the pixels are kept as they are.
    """
    method = _TRANSPOSE.get(_orientation(image))
    turned = image.copy() if method is None else image.transpose(method)
    for key in _ORIENTATION_KEYS:
        turned.info.pop(key, None)
    return turned


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that `to_rgb` gives an image, without touching its pixels."""
    sideways = _orientation(image) in _SIDEWAYS
    return (image.height, image.width) if sideways else image.size


def to_rgb(image: Image.Image, background: Colour | None = (255, 255, 255)) -> Image.Image:
    """Convert an image of any mode to an upright RGB one.

    Transparency is composited on `background`; None leaves it out of account, as `convert("RGB")`
    does: a transparent pixel has the colour that is stored for it. 16-bit greys (also those that
    Pillow holds as 32-bit integers or floats) are scaled, not clipped, to 8 bits; floats up to 1.0
    are fractions.

    Raises:
        ImageError: grey levels outside 0..65535.
    """
    if _orientation(image) in _TRANSPOSE:
        image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey_to_8_bit(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":  # Pillow converts premultiplied grey to nothing else.
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    if background is None:
        return rgba.convert("RGB")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


class _WholeBytes(io.BytesIO):
    """Bytes whose end is an error, also while Pillow is told to accept truncated files."""

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(size)
        if not chunk and size is not None and size > 0:
            raise OSError("image file is truncated")
        return chunk


def _open(data: bytes, name: str) -> Image.Image:
    """Read the header, as `Image.open` does, but leave its size to our limits.

    `Image.open` would warn or raise by a process-wide setting that is not ours to change.
    """
    Image.init()
    found = f"{len(data)} bytes that start with {data[:16]!r}"
    for image_format in FORMATS:
        factory = _factory(image_format, data[:16])
        if factory is None:
            continue
        try:
            return factory(_WholeBytes(data), "")
        except _NOT_THIS_FORMAT as error:
            found = f"a damaged {image_format} header: {error}"
        except Exception as error:
            raise _damaged(name, str(error)) from error
    raise ImageError(
        f"{name} is not an image that can be read.",
        found=found,
        expected="one of " + ", ".join(FORMATS),
        fix="send the image as PNG or JPEG",
    )


def _factory(image_format: str, prefix: bytes) -> _Factory | None:
    """Pillow's opener of a format; None when it is not built in or `prefix` is not of it."""
    factory, accept = Image.OPEN.get(image_format, (None, None))
    verdict = accept is not None and accept(prefix)
    return factory if verdict and not isinstance(verdict, str) else None


def _damaged(name: str, found: str) -> ImageError:
    return ImageError(
        f"{name} is truncated or damaged.",
        found=found,
        expected="a whole image file",
        fix="write or download the file again",
    )


def _orientation(image: Image.Image) -> int:
    try:
        # Not the PNG reader's own `getexif`: it decodes the pixels to look behind them.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG)
    except _BAD_METADATA:
        return 1
    return value if isinstance(value, int) else 1


def _deep_grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Mode L; or LA when a grey level is declared transparent."""
    levels = np.asarray(image)
    white = 1 if image.mode == "F" and levels.max() <= 1 else 65535
    if not (levels.min() >= 0 and levels.max() <= white):
        raise ImageError(
            f"The grey levels of an image of mode {image.mode} are out of range.",
            found=f"{levels.min()} to {levels.max()}",
            expected="16-bit levels, 0 to 65535" + (", or 0 to 1.0" * (image.mode == "F")),
            fix="scale the image to 8 or 16 bits",
        )
    scaled = np.rint(levels * np.float32(255 / white)).astype(np.uint8)
    grey = Image.fromarray(scaled)
    if "transparency" not in image.info:
        return grey
    alpha = np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))
