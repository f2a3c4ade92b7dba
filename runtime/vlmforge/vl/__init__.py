"""Images: loading, decoding and preprocessing."""

from __future__ import annotations

from vlmforge.vl.encode import encode_image_base64
from vlmforge.vl.load import load_image

__all__ = ["load_image", "encode_image_base64"]
