"""Images as text, for requests over the wire."""

from __future__ import annotations

import base64
import io

from vlmforge.errors import ImageError
from vlmforge.vl.decode import to_rgb
from vlmforge.vl.load import ImageSource, load_image
from vlmforge.vl.orientation import of_image, turned

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


def encode_image_base64(image: ImageSource, format: str = "PNG") -> str:  # noqa: A002
    """Base64 of an image file, upright.

    Args:
        image: Whatever `load_image` takes.
        format: "PNG" is lossless; modes that it lacks are converted to RGB. "JPEG" is RGB always,
            and not what was put in.

    Raises:
        ImageError: not an image, or another format.
    """
    if format not in ("PNG", "JPEG"):
        raise ImageError(
            "Images are not encoded in this format.",
            found=f"format={format!r}",
            expected="'PNG' or 'JPEG'",
            fix="leave format out",
        )
    loaded = load_image(image)
    keep = format == "PNG" and loaded.mode in _PNG_MODES
    upright = turned(loaded, of_image(loaded)) if keep else to_rgb(loaded)
    buffer = io.BytesIO()
    upright.save(buffer, format=format)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
