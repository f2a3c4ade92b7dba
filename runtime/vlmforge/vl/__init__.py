"""Images: loading, decoding, preprocessing, drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmforge.vl.encode import encode_image_base64
from vlmforge.vl.load import load_image

if TYPE_CHECKING:
    from vlmforge.vl.draw import draw_boxes

__all__ = ["load_image", "encode_image_base64", "draw_boxes"]


def __getattr__(name: str) -> object:
    if name != "draw_boxes":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlmforge.vl.draw import draw_boxes  # Pillow's fonts only where something is drawn

    return draw_boxes
