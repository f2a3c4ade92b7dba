"""Which way up an image is, by its metadata, and turning it that way.

The tag's meaning is in CIPA DC-008 (EXIF 2.32), 4.6.4 A. Metadata of a file is read here and not by
Pillow, which reads all of it: of hostile EXIF that is work and memory without need.
"""

from __future__ import annotations

import re
import struct

from PIL import Image

TAG = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UPRIGHT = 1

_SIDEWAYS = (5, 6, 7, 8)
_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_BYTE_ORDERS = {b"II": "<", b"MM": ">"}
_INTEGERS = {1: "B", 3: "H", 4: "L"}  # BYTE, SHORT and LONG of TIFF 6.0
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_UNREADABLE = (
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    OSError,
    EOFError,
    struct.error,
)


def of_exif(exif: bytes) -> int | None:
    """The tag in the first directory of EXIF data; None when it is not there, or not readable."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = _BYTE_ORDERS.get(exif[:2])
    if order is None or len(exif) < 8:
        return None
    (start,) = struct.unpack_from(order + "L", exif, 4)
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, start)
    last = min(start + 2 + 12 * count, len(exif) - 11)
    for at in range(start + 2, last, 12):
        tag, kind, values = struct.unpack_from(order + "HHL", exif, at)
        if tag == TAG:
            known = values == 1 and kind in _INTEGERS
            return int(struct.unpack_from(order + _INTEGERS[kind], exif, at + 8)[0]) if known else 1
    return None


def of_xmp(xmp: bytes) -> int | None:
    """The tag in an XMP packet; None when it is not there."""
    found = _XMP.search(xmp)
    return int(found[1]) if found else None


def of_image(image: Image.Image) -> int:
    """The tag of a Pillow image. Metadata that cannot be read says `UPRIGHT`."""
    try:
        # Not the PNG reader's own `getexif`: that decodes the pixels, to look behind them.
        value = Image.Image.getexif(image).get(TAG)
    except _UNREADABLE:
        return UPRIGHT
    return value if isinstance(value, int) else UPRIGHT


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height after `turned`."""
    return (size[1], size[0]) if orientation in _SIDEWAYS else size


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """A copy that is upright, without the metadata that says how to turn it."""
    method = TRANSPOSE.get(orientation)
    copy = image.copy() if method is None else image.transpose(method)
    for key in _KEYS:
        copy.info.pop(key, None)
    return copy
