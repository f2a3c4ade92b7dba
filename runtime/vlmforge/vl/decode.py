"""Bytes to whole, upright images within limits, and images of every mode to RGB."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmforge.engine.images.pixels import Colour
from vlmforge.errors import ImageError
from vlmforge.vl.encoded import DEEP_FORMATS, open_encoded
from vlmforge.vl.image_limits import DEFAULT_LIMITS, ImageLimits
from vlmforge.vl.orientation import TRANSPOSE, of_image, turned, turned_size

"""Red, green and blue, 0 to 255."""

_SCALES = {"I": (255, 65535), "F": (1, 255, 65535)}


def decode_image(data: bytes, *, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode `data`: the first frame, upright, in the file's own mode.

    Args:
        data: A file of one of `limits.formats`.
        name: What error messages call it.
        limits: Checked against the header, before any pixel is decoded.

    Raises:
        ImageError: empty, not an image, truncated, damaged, or over a limit.
    """
    return open_encoded(data, name=name, limits=limits).decode()


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that `to_rgb` gives an image, without touching its pixels."""
    return turned_size(image.size, of_image(image))


def to_rgb(image: Image.Image, background: Colour | None = (255, 255, 255)) -> Image.Image:
    """Convert an image of any mode to an upright RGB one.

    Transparency is composited on `background`; None leaves it out of account, as `convert("RGB")`
    does: a transparent pixel has the colour that is stored for it.

    Greys are scaled to 8 bits, not clipped. White is 65535 in the modes I;16*, and in mode I as it
    comes from a PNG or PGM. The modes I and F alone do not tell their scale, so the data do: white
    is 255 where no level is above it (as `convert("I")` and `convert("F")` give them), else 65535;
    and 1.0 in mode F where no level is above that. Where the highest level is above white by less
    than a factor of two, it may as well be an overshoot of that scale: that is refused.

    Raises:
        ImageError: grey levels below 0, above 65535, or of a scale that cannot be told; or Pillow
            cannot convert the image.
    """
    try:
        return _converted(image, background)
    except ImageError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, OSError) as error:
        raise ImageError(
            f"An image of mode {image.mode} cannot be converted to RGB.",
            found=f"{type(error).__name__}: {error}"[:200],
            expected="an image that image.convert('RGBA') takes",
            fix="convert it to mode RGB, or save it again as PNG",
        ) from error


def _converted(image: Image.Image, background: Colour | None) -> Image.Image:
    orientation = of_image(image)
    if not _fits(image.mode, image.info.get("transparency")):
        image = image.copy()
        del image.info["transparency"]
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey_to_8_bit(image)
    if orientation in TRANSPOSE:
        image = turned(image, orientation)
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


def _fits(mode: str, transparent: object) -> bool:
    """Whether a transparent colour is one of its mode. Pillow carries it along to other modes.

    A file may state more levels of transparency than a palette can have colours: as in libpng, it
    then states none.
    """
    if transparent is None:
        return True
    if isinstance(transparent, bytes):
        return mode in ("P", "PA") and len(transparent) <= 256
    if mode == "RGB":
        return isinstance(transparent, tuple) and len(transparent) == 3
    return isinstance(transparent, int) and mode not in ("YCbCr", "CMYK", "HSV", "LAB")


def _deep_grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Mode L; or LA when a grey level is declared transparent."""
    levels = np.asarray(image)
    scaled = np.rint(levels * np.float32(255 / _white(image, levels))).astype(np.uint8)
    grey = Image.fromarray(scaled)
    if "transparency" not in image.info:
        return grey
    alpha = np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _white(image: Image.Image, levels: NDArray[Any]) -> int:
    """The level of white (see `to_rgb`)."""
    known = image.mode != "F" and (image.mode != "I" or image.format in DEEP_FORMATS)
    scales = (65535,) if known else _SCALES[image.mode]
    low, high = levels.min(), levels.max()
    white = next((scale for scale in scales if high <= scale), None)
    overshoots = any(scale < high < 2 * scale for scale in scales)
    if white is None or not low >= 0 or overshoots:
        raise ImageError(
            f"The grey levels of an image of mode {image.mode} "
            + ("are out of range." if white is None or not low >= 0 else "are of no known scale."),
            found=f"{low} to {high}",
            expected=" or ".join(f"0 to {scale}, {scale} being white" for scale in scales),
            fix="scale them to 0..255 and convert the image to mode L; or convert 16-bit levels to "
            "mode I;16",
        )
    return white
