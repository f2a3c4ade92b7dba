"""An image to the vision part's pixel values, by the engine's image policy."""

from __future__ import annotations

from PIL import Image

from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.images.pixels import PixelValues
from vlmforge.vl.decode import to_rgb


def preprocess(image: Image.Image, policy: ImagePolicy) -> PixelValues:
    """Pixel values of an image of any mode (see `PreparedImage`), as the originals compute them.

    Raises:
        ImageError: an aspect ratio too extreme for the policy.
    """
    return policy.pixels(to_rgb(image, policy.format.background))
