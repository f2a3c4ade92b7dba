"""What an image from outside may be and may cost. Needs neither Pillow nor numpy."""

from __future__ import annotations

import os

from msgspec import Struct

DEFAULT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats that are read unless others are asked for: their decoders are C, and their work is known
from the file's structure before any pixel is decoded."""

FORMATS = (*DEFAULT_FORMATS, "TIFF", "AVIF", "PPM", "QOI")
"""Formats that can be asked for. Of the last four only pixels and time are limited, not the work
in advance; some of their decoders are Python. None runs another program, as EPS does."""


class ImageLimits(Struct, frozen=True):
    """What an image may be and may cost.

    Attributes:
        max_pixels: Width times height.
        max_bytes: Size of the encoded file.
        max_work: Pixels times the passes over them, estimated before decoding. Only a JPEG in
            several scans has more than one pass; a pass counts as at least 65536 pixels.
        decode_s: Seconds that decoding may take. A decoder is asked between pieces of the file.
        timeout_s: Seconds that a fetch may take in all.
        max_redirects: Redirects that a fetch follows.
        formats: Of `FORMATS`, those that are read. The bytes say which it is, no label.
        media_domains: Hosts that images are fetched from, redirects included; None: all.
        local_files: Whether paths and `file://` URLs are opened: all, none, or those in a folder.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 64 * 1024 * 1024
    max_work: int = 1_000_000_000
    decode_s: float = 20.0
    timeout_s: float = 10.0
    max_redirects: int = 3
    formats: tuple[str, ...] = DEFAULT_FORMATS
    local_files: bool | str | os.PathLike[str] = True
    media_domains: tuple[str, ...] | None = None


DEFAULT_LIMITS = ImageLimits()
