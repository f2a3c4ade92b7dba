"""Image policies: an RGB image to the vision part's pixel values, as the originals compute them.

Pixel parity is with the processors that resize with Pillow. All arithmetic on pixels is Pillow's
8-bit resampling, followed by one float32 table lookup per channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmforge.engine.image_policy import ImagePolicy
from vlmforge.errors import EngineFormatError, ImageError
from vlmforge.vl.decode import to_rgb
from vlmforge.vl.tiling import best_canvas, fitted_size, tile_boxes

MAX_RESIZED_PIXELS = 1 << 25
"""Above this, only the part of the resized image that the crop keeps is computed."""

MAX_SQUARE_SIDE = 1 << 15
"""Longest side of an image that may be padded to a square."""

_BAND_PIXELS = 1 << 22
_MAX_FILTER_SUPPORT = 3

Box = tuple[int, int, int, int]


def preprocess(image: Image.Image, policy: ImagePolicy) -> NDArray[np.float32]:
    """Pixel values `[views, 3, H, W]` of `image` under `policy`.

    Raises:
        EngineFormatError: a policy or filter that this version does not know.
        ImageError: an aspect ratio too extreme to be padded to a square.
    """
    if policy.name not in POLICIES:
        raise _unknown("image policy", policy.name, POLICIES)
    return POLICIES[policy.name](image, policy)


def center_crop(image: Image.Image, policy: ImagePolicy) -> NDArray[np.float32]:
    """Resize the shorter side to `shortest_edge`, keep the centre. One view."""
    rgb = to_rgb(image, policy.background)
    return _normalize(_resize_and_crop(rgb, policy), policy)


def pad_square(image: Image.Image, policy: ImagePolicy) -> NDArray[np.float32]:
    """Centre on a square of `pad_fill`, then as `center_crop`. One view."""
    rgb = to_rgb(image, policy.background)
    square = _padded_square(rgb, policy.shortest_edge, _filter(policy), policy.pad_fill)
    return _normalize(square.crop(_centre_box(square.size, policy.crop)), policy)


def stretch(image: Image.Image, policy: ImagePolicy) -> NDArray[np.float32]:
    """Resize to `crop`, whatever the aspect ratio. One view."""
    rgb = to_rgb(image, policy.background)
    height, width = policy.crop
    return _normalize(rgb.resize((width, height), _filter(policy)), policy)


def anyres(image: Image.Image, policy: ImagePolicy) -> NDArray[np.float32]:
    """The whole image squeezed to a tile, then the tiles of its canvas (see `Tiling`)."""
    tiling = policy.tiling
    if tiling is None:
        raise _unknown("tiling", "null", {"a tiling": None})
    rgb, resample = to_rgb(image, policy.background), _filter(policy)
    size = best_canvas(rgb.size, tiling.canvases)
    fitted = rgb.resize(fitted_size(rgb.size, size), resample)
    canvas = Image.new("RGB", size, tiling.fill)
    canvas.paste(fitted, ((size[0] - fitted.width) // 2, (size[1] - fitted.height) // 2))
    views = [rgb.resize((tiling.tile, tiling.tile), resample)]
    views += [canvas.crop(box) for box in tile_boxes(size, tiling.tile)]
    return np.concatenate([_normalize(view, policy) for view in views])


POLICIES: Mapping[str, Callable[[Image.Image, ImagePolicy], NDArray[np.float32]]] = (
    MappingProxyType(
        {"center_crop": center_crop, "pad_square": pad_square, "anyres": anyres, "stretch": stretch}
    )
)


def shortest_edge_size(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """`size` (width, height) scaled so that its shorter side is `edge`; the longer truncates."""
    width, height = size
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _resize_and_crop(rgb: Image.Image, policy: ImagePolicy) -> Image.Image:
    size = shortest_edge_size(rgb.size, policy.shortest_edge)
    box = _centre_box(size, policy.crop)
    if math.prod(size) > MAX_RESIZED_PIXELS:
        return _resize_window(rgb, size, box, _filter(policy))
    return rgb.resize(size, _filter(policy)).crop(box)


def _centre_box(size: tuple[int, int], crop: tuple[int, int]) -> Box:
    """Centre crop box; where the crop is larger it starts below 0, and Pillow fills zeros."""
    width, height = size
    crop_height, crop_width = crop
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _resize_window(
    rgb: Image.Image, size: tuple[int, int], box: Box, resample: Image.Resampling
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


def _padded_square(
    rgb: Image.Image, edge: int, resample: Image.Resampling, fill: tuple[int, int, int]
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


def _normalize(rgb: Image.Image, policy: ImagePolicy) -> NDArray[np.float32]:
    """`(level * rescale_factor - mean) / std` as `[1, 3, H, W]`, rounded as the originals round.

    They rescale in float64, cast to float32 and normalise in float32; there are only 256 levels.
    """
    levels = (np.arange(256, dtype=np.float64) * policy.rescale_factor).astype(np.float32)
    mean, std = np.array(policy.mean, np.float32), np.array(policy.std, np.float32)
    table = (levels[:, None] - mean) / std
    pixels = np.asarray(rgb)
    return np.stack([table[pixels[..., c], c] for c in range(3)])[None]


def _filter(policy: ImagePolicy) -> Image.Resampling:
    filters = {member.name.lower(): member for member in Image.Resampling}
    if policy.resample not in filters:
        raise _unknown("resampling filter", policy.resample, filters)
    return filters[policy.resample]


def _unknown(what: str, name: str, known: Mapping[str, object]) -> EngineFormatError:
    return EngineFormatError(
        f"The {what} that the engine asks for is unknown to this version.",
        found=repr(name),
        expected="one of: " + ", ".join(known),
        fix="install a newer vlmforge, or build the engine again",
    )
