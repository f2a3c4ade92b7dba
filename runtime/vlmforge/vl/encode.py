"""Images as text, for requests over the wire."""

from __future__ import annotations

import base64
import io

from PIL import Image

from vlmforge.vl.decode import to_rgb
from vlmforge.vl.orientation import of_image, turned

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


def encode_image_base64(image: Image.Image) -> str:
    """Base64 of `image` as PNG: upright, lossless; modes that PNG lacks are converted to RGB."""
    image = turned(image, of_image(image)) if image.mode in _PNG_MODES else to_rgb(image)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
