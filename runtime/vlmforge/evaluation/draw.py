"""From a scene to a picture: varied sizes, backgrounds, noise, rotation and colours."""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from vlmforge.evaluation.scenes import Scene, Thing

_RGB = {
    "red": (214, 40, 40),
    "green": (42, 165, 62),
    "blue": (45, 90, 220),
    "yellow": (245, 212, 45),
    "purple": (155, 62, 190),
    "white": (244, 244, 240),
}
# Radius as a share of the shorter side of a place.
_RADIUS = {"small": 0.31, "large": 0.47}
_PHOTOS = ("china.jpg", "flower.jpg")
_MAX_TILT = 22.0  # degrees


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of `scene`, 96 to 160 pixels high and wide, sides at most 4:3."""
    height = int(rng.integers(96, 161))
    width = int(np.clip(height * rng.uniform(0.75, 4 / 3), 96, 160))
    picture = Image.fromarray(_background(height, width, rng))
    canvas = ImageDraw.Draw(picture)
    for thing in scene.things:
        _draw_thing(canvas, thing, (width, height), rng)
    if rng.random() < 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.8))))
    return _with_noise(picture, rng)


def _draw_thing(
    canvas: ImageDraw.ImageDraw, thing: Thing, size: tuple[int, int], rng: np.random.Generator
) -> None:
    cell_width, cell_height = size[0] / 3, size[1] / 3
    radius = _RADIUS[thing.size] * min(cell_width, cell_height) * rng.uniform(0.94, 1.06)
    slack_x, slack_y = max(cell_width / 2 - radius, 0), max(cell_height / 2 - radius, 0)
    x = (thing.column + 0.5) * cell_width + rng.uniform(-0.5, 0.5) * slack_x
    y = (thing.row + 0.5) * cell_height + rng.uniform(-0.5, 0.5) * slack_y
    jitter = rng.integers(-18, 19, size=3)
    red, green, blue = (int(v) for v in np.clip(np.array(_RGB[thing.color]) + jitter, 0, 255))
    outline = (20, 20, 20) if rng.random() < 0.4 else None
    tilt = math.radians(rng.uniform(-_MAX_TILT, _MAX_TILT))
    if thing.shape == "circle":
        box = (x - radius, y - radius, x + radius, y + radius)
        canvas.ellipse(box, fill=(red, green, blue), outline=outline)
        return
    points = [
        (
            x + radius * (px * math.cos(tilt) - py * math.sin(tilt)),
            y + radius * (px * math.sin(tilt) + py * math.cos(tilt)),
        )
        for px, py in _outline(thing.shape)
    ]
    canvas.polygon(points, fill=(red, green, blue), outline=outline)


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners on or inside the unit circle; y grows downwards."""
    if shape == "square":
        return ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
    if shape == "triangle":
        return _ring(3, (1.05,))
    if shape == "star":
        return _ring(10, (1.05, 0.42))
    if shape == "cross":
        quarter = ((0.3, -0.95), (0.3, -0.3), (0.95, -0.3))
        turned = quarter
        points: list[tuple[float, float]] = []
        for _ in range(4):
            points.extend(turned)
            turned = tuple((-y, x) for x, y in turned)  # type: ignore[assignment]
        return tuple(points)
    raise KeyError(shape)


def _ring(count: int, radii: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    return tuple(
        (
            radii[i % len(radii)] * math.sin(2 * math.pi * i / count),
            -radii[i % len(radii)] * math.cos(2 * math.pi * i / count),
        )
        for i in range(count)
    )


def _background(height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Muted, so that every colour of a thing stands out."""
    kind = rng.choice(("plain", "gradient", "stripes", "photo"), p=(0.4, 0.25, 0.15, 0.2))
    if kind == "photo":
        return _photo_crop(height, width, rng)
    first, second = _muted(rng), _muted(rng)
    if kind == "plain":
        share = np.zeros((height, width, 1))
    else:
        angle = rng.uniform(0, math.pi)
        y, x = np.mgrid[:height, :width]
        along = (x * math.cos(angle) + y * math.sin(angle))[..., None]
        if kind == "stripes":
            share = 0.3 * ((along // rng.uniform(6, 24)) % 2)
        else:
            share = (along - along.min()) / np.ptp(along)
    return (first + (second - first) * share).astype(np.uint8)


def _muted(rng: np.random.Generator) -> NDArray[np.float64]:
    return np.clip(rng.uniform(15, 165) + rng.uniform(-14, 14, size=3), 0, 255)


def _photo_crop(height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    photo = _photo(str(rng.choice(_PHOTOS)))
    side = int(rng.integers(40, min(photo.size)))
    left = int(rng.integers(0, photo.width - side + 1))
    top = int(rng.integers(0, photo.height - side + 1))
    box = (left, top, left + side, top + side)
    crop = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR, box=box), np.float64)
    grey = crop.mean(axis=-1, keepdims=True)
    dimmed: NDArray[np.uint8] = ((grey + 0.3 * (crop - grey)) * rng.uniform(0.35, 0.6)).astype(
        np.uint8
    )
    return dimmed


@cache
def _photo(name: str) -> Image.Image:
    with files("vlmforge.evaluation").joinpath("photos", name).open("rb") as file:
        return Image.open(file).convert("RGB")


def _with_noise(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    level = rng.uniform(0, 8)
    pixels = np.asarray(picture, np.float32)
    noise = rng.standard_normal(pixels.shape, np.float32) * np.float32(level)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
