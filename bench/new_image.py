"""Images that no cache has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def new_image(seed: int) -> Image.Image:
    """Noise, another for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (480, 640, 3), np.uint8)
    return Image.fromarray(pixels)


def saved_image(work: Path, seed: int) -> Path:
    """A file with such an image, in place of the last one."""
    path = work / "round.png"
    new_image(seed).save(path)
    return path
