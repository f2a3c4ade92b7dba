"""Image files for tests, put together from their parts."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


def png_header(width: int, height: int) -> bytes:
    """A PNG of RGB pixels that has none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(png_chunk(*chunk) for chunk in chunks)


def jpeg_segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def scans_of(jpeg: bytes) -> list[int]:
    """Where the scans of a JPEG of Pillow's begin; it has no 0xFFDA in its tables."""
    return [i for i in range(len(jpeg)) if jpeg[i : i + 2] == b"\xff\xda"]


def with_more_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes `count` times more."""
    return jpeg[:-2] + jpeg[scans_of(jpeg)[-1] : -2] * count + b"\xff\xd9"


def run_length_bmp(width: int, height: int) -> bytes:
    """A BMP in RLE8 of one colour."""
    rows = (bytes([width, 7]) + b"\0\0") * height + b"\0\1"
    palette = bytes(range(256)) * 4
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start) + header + palette + rows
