"""The structure of encoded files: what their decoder needs of them, and what it will cost.

A decoder is handed only the parts that decide pixels. Comments, colour profiles, thumbnails and
further frames stay behind: readers spend work and memory on them (PNG's compressed texts, GIF's
comments, JPEG's EXIF), and nothing here uses them. Sources: PNG (Third Edition) 5 and 11, ISO/IEC
10918-1 annex B, GIF89a, the WebP container specification.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from msgspec import Struct

from vlmforge.vl import orientation

MAX_PARTS = 1 << 17
"""Chunks, segments or blocks that are looked at: 64 MiB of parts of 512 bytes."""

_MAX_TEXT = 1 << 20
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


class DamagedError(ValueError):
    """The structure is broken before the first pixel; the text says where."""


class Container(Struct, frozen=True):
    """An encoded file as its decoder gets it.

    Attributes:
        data: The file without what does not decide its pixels.
        orientation: EXIF's; None: not read, Pillow knows.
        passes: How often the decoder goes over all pixels.
        canvas: Width and height, where a reader would take memory for them before it tells.
    """

    data: bytes
    orientation: int | None
    passes: int = 1
    canvas: tuple[int, int] | None = None


def png(data: bytes) -> Container:
    """Of a PNG: header, palette, transparency and pixels. Its end may be missing.

    Raises:
        DamagedError: see there.
    """
    kept, pixels, turns = {b"sig": data[:8]}, [], _PngOrientation()
    at = 8
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">L4s", data, at)
        end = at + 12 + length
        if kind == b"IEND" or not kind.isalpha():
            break
        if kind == b"IDAT":
            pixels.append(data[at + 8 : end - 4])
        elif end > len(data):
            break
        elif kind in (b"IHDR", b"PLTE", b"tRNS") and not pixels:
            kept.setdefault(kind, data[at:end])
        else:
            turns.look(kind, data[at + 8 : end - 4])
        at = end
    else:
        raise _too_many()
    if b"IHDR" not in kept:
        raise DamagedError("it has no IHDR chunk")
    if not pixels:
        raise DamagedError("it has no IDAT chunk")
    parts = [*kept.values(), _png_chunk(b"IDAT", b"".join(pixels)), _png_chunk(b"IEND", b"")]
    return Container(b"".join(parts), turns.value)


def _png_chunk(kind: bytes, payload: bytes) -> bytes:
    crc = zlib.crc32(payload, zlib.crc32(kind))
    return struct.pack(">L", len(payload)) + kind + payload + struct.pack(">L", crc)


class _PngOrientation:
    """Where a PNG may say which way up it is: EXIF, EXIF as hexadecimal text, XMP; the first."""

    def __init__(self) -> None:
        self._exif: bytes | None = None
        self._profile: bytes | None = None
        self._xmp: bytes | None = None

    def look(self, kind: bytes, payload: bytes) -> None:
        """Remember a chunk that says it."""
        keyword = payload[:100].partition(b"\0")[0] if kind in _PNG_TEXTS else b""
        if kind == b"eXIf" and self._exif is None:
            self._exif = payload
        elif keyword == b"Raw profile type exif" and self._profile is None:
            self._profile = _png_text(kind, payload[len(keyword) + 1 :])
        elif keyword == b"XML:com.adobe.xmp" and self._xmp is None:
            self._xmp = _png_text(kind, payload[len(keyword) + 1 :])

    @property
    def value(self) -> int:
        """EXIF goes before XMP."""
        exif = self._exif
        if exif is None and self._profile is not None:
            exif = _unhex(self._profile)
        return _first(exif, self._xmp)


def _png_text(kind: bytes, rest: bytes) -> bytes:
    """The text behind a text chunk's keyword; of a compressed one its first MiB."""
    compressed = kind == b"zTXt"
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":
        compressed = rest[:1] == b"\1"
        rest = rest[2:].split(b"\0", 2)[-1]
    if not compressed:
        return rest
    try:
        return zlib.decompressobj().decompress(rest, _MAX_TEXT)
    except zlib.error:
        return b""


def _unhex(profile: bytes) -> bytes | None:
    """ImageMagick's profile: an empty line, a name, a length, then lines of hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(profile.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return None


def _first(exif: bytes | None, xmp: bytes | None) -> int:
    found = orientation.of_exif(exif) if exif else None
    if found is None and xmp:
        found = orientation.of_xmp(xmp)
    return orientation.UPRIGHT if found is None else found


_MARKER = re.compile(rb"\xff[^\x00\xff]")
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xDA)})
_SOS, _EOI, _APP1 = 0xDA, 0xD9, 0xE1
_JFIF, _ADOBE = (0xE0, b"JFIF\0"), (0xEE, b"Adobe")  # they say how colours are stored
_APPLICATION = frozenset({0xFE, *range(0xE0, 0xF0)})
_LONGEST_FILL = 1 << 12
_WINDOW = 1 << 18


def jpeg(data: bytes) -> Container:
    """Of a JPEG: its tables, frame and scans; what JFIF and Adobe say of its colours.

    Raises:
        DamagedError: see there.
    """
    kept: list[bytes] = []
    colours: dict[tuple[int, bytes], bytes] = {}
    exif = xmp = None
    at = 2
    for _ in range(MAX_PARTS):
        start, marker, payload, end = _segment(data, at)
        if marker == _SOS:
            head = b"".join([data[:2], *colours.values(), *kept])
            return Container(head + data[start:], _first(exif, xmp), _scans(data, end))
        if marker == _APP1 and payload.startswith(b"Exif\0\0"):
            exif = exif or payload
        elif marker == _APP1 and payload.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or payload
        elif (kind := (marker, payload[:5])) in (_JFIF, _ADOBE):
            colours[kind] = data[start:end]
        elif marker not in _APPLICATION and marker not in _WITHOUT_LENGTH:
            kept.append(data[start:end])
        at = end
    raise _too_many()


def _segment(data: bytes, at: int) -> tuple[int, int, bytes, int]:
    """The next segment from `at` on: its start, marker, payload, and its end."""
    found = _find(_MARKER, data, at)
    if found is None:
        raise DamagedError("it ends before its first scan")
    marker, end = data[found.start() + 1], found.end()
    if marker in _WITHOUT_LENGTH:
        return found.start(), marker, b"", end
    length = int.from_bytes(data[end : end + 2], "big")
    if length < 2 or end + length > len(data):
        raise DamagedError("it ends before its first scan")
    return found.start(), marker, data[end + 2 : end + length], end + length


def _find(marker: re.Pattern[bytes], data: bytes, at: int) -> re.Match[bytes] | None:
    """The next marker; searched for in windows, for other threads stand still in each."""
    while at < len(data):
        found = marker.search(data, at, at + _WINDOW)
        if found is not None:
            return found
        at += _WINDOW - 1
    return None


def _scans(data: bytes, at: int) -> int:
    """How many scans there are when the first one's entropy-coded data begins at `at`.

    The decoder looks for markers in the same way, so that it cannot find more of them.
    """
    if data.find(b"\xff" * _LONGEST_FILL, at) >= 0:  # the decoder begins it anew with each piece
        raise DamagedError(f"it has {_LONGEST_FILL} fill bytes in a row")
    scans = 1
    for _ in range(MAX_PARTS):
        found = _find(_MARKER_IN_SCAN, data, at)
        if found is None or data[found.start() + 1] == _EOI:
            return scans
        marker, at = data[found.start() + 1], found.end()
        scans += marker == _SOS
        if marker not in _WITHOUT_LENGTH:
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
    raise _too_many()


def gif(data: bytes) -> Container:
    """Of a GIF: its screen, large enough for the first frame, and from that frame on.

    Raises:
        DamagedError: see there.
    """
    if len(data) < 13:
        raise DamagedError("it ends in its header")
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = tables = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control = b""
    parts = iter(range(MAX_PARTS))  # extensions, and the blocks inside them
    for _ in parts:
        kind, label = data[at : at + 1], data[at + 1 : at + 2]
        if kind == b",":
            frame = struct.unpack_from("<4H", data, at + 1) if at + 9 <= len(data) else (0,) * 4
            screen = max(width, frame[0] + frame[2]), max(height, frame[1] + frame[3])
            if max(screen) > 0xFFFF:
                raise DamagedError("its first frame is outside of its screen")
            head = data[:6] + struct.pack("<HH", *screen) + data[10:tables]
            return Container(head + control + data[at:], orientation.UPRIGHT)
        if kind in (b"", b";"):
            raise DamagedError("it has no frame")
        end = _after_blocks(data, at + 2, parts) if kind == b"!" else at + 1
        if kind == b"!" and label == b"\xf9":
            control = data[at:end]
        at = end
    raise _too_many()


def _after_blocks(data: bytes, at: int, parts: Iterator[int]) -> int:
    for _ in parts:
        size = data[at] if at < len(data) else 0
        at += 1 + size
        if not size:
            return at
    raise _too_many()


def webp(data: bytes) -> Container:
    """Of a WebP: all of it, and what its header says.

    Raises:
        DamagedError: see there.
    """
    exif = xmp = None
    at = 12
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sL", data, at)
        if kind == b"EXIF":
            exif = exif or data[at + 8 : at + 8 + length]
        elif kind == b"XMP ":
            xmp = xmp or data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    else:
        raise _too_many()
    return Container(data, _first(exif, xmp), canvas=_webp_canvas(data))


def _webp_canvas(data: bytes) -> tuple[int, int]:
    if len(data) < 30:
        raise DamagedError("it ends in its header")
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return width, height
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def bmp(data: bytes) -> Container:
    """Of a BMP: all of it."""
    return Container(data, orientation.UPRIGHT)


CONTAINERS: Mapping[str, Callable[[bytes], Container]] = MappingProxyType(
    {"PNG": png, "JPEG": jpeg, "GIF": gif, "WEBP": webp, "BMP": bmp}
)


def _too_many() -> DamagedError:
    return DamagedError(f"it has more than {MAX_PARTS} parts")
