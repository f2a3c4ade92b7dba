"""Encoded files: the header within limits first, and then, fed in pieces, the pixels."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable
from typing import IO

from msgspec import Struct, structs
from PIL import Image, ImageFile

from vlmforge.errors import CancelledError, ImageError, VlmforgeError
from vlmforge.vl.containers import CONTAINERS, Container, DamagedError
from vlmforge.vl.image_limits import DEFAULT_LIMITS, FORMATS, ImageLimits
from vlmforge.vl.orientation import of_image, turned, turned_size

Cancelled = Callable[[], bool]
"""Says whether an image is no longer wanted. It may be called from any thread."""

DEEP_FORMATS = ("PNG", "PPM")
"""Formats from which Pillow reads 16-bit greys into mode I; of other images of that mode the scale
is not known."""

_Factory = Callable[[IO[bytes], str | bytes], Image.Image]

_NOT_THIS_FORMAT = (SyntaxError, IndexError, TypeError, struct.error)
_C_DECODERS = frozenset({"zip", "jpeg", "gif", "raw"})
_PIECES = 64
_SMALLEST_PIECE = 256
_LEAST_PASS = 1 << 16
_PLAIN_PPM = (b"P1", b"P2", b"P3")  # numbers as text: the last one may end where the file does


class EncodedImage(Struct, frozen=True):
    """A file whose header is read and within the limits.

    Attributes:
        name: What error messages call it.
        size: Width and height of the image, upright.
    """

    name: str
    size: tuple[int, int]
    _format: str
    _container: Container
    _limits: ImageLimits
    _quoted: bool

    @property
    def content(self) -> tuple[bytes, int]:
        """What decides the pixels: the decoder's bytes, and how they are turned."""
        return self._container.data, self._container.orientation or 0

    def oriented(self, orientation: int) -> EncodedImage:
        """This one, turned by an orientation that was read earlier and is in its file no more."""
        container = structs.replace(self._container, orientation=orientation)
        own = self._container.orientation or 0
        size = turned_size(turned_size(self.size, own), orientation)
        return structs.replace(self, size=size, _container=container)

    def decode(self, cancelled: Cancelled | None = None) -> Image.Image:
        """The first frame, upright, in the file's own mode.

        Raises:
            ImageError: truncated, damaged, or not done in time.
            CancelledError: `cancelled` said so.
        """
        feed = _Feed(self._container.data, self.name, self._limits, cancelled)
        image = _header(self._format, feed, self.name, self._quoted)
        _read_in_pieces(image, feed)
        try:
            load_pixels(image, name=self.name, quoted=self._quoted)
        finally:
            # It holds the image: pixels would stay until the garbage collector comes for cycles.
            vars(image).pop("load_read", None)
        orientation = self._container.orientation
        if image.mode == "I" and self._format in DEEP_FORMATS:
            image = image.convert("I;16")
        return turned(image, of_image(image) if orientation is None else orientation)


def open_encoded(
    data: bytes, *, name: str, limits: ImageLimits = DEFAULT_LIMITS, quoted: bool = True
) -> EncodedImage:
    """Read the header of `data` and check it against `limits`; no pixel is decoded.

    Args:
        data: A file of one of `limits.formats`.
        name: What error messages call it.
        limits: What it may cost.
        quoted: Whether errors may quote bytes. Not where the one who asks for the image need not
            be one who may read it: files and web pages.

    Raises:
        ImageError: empty, not an image, a damaged header, or over a limit.
    """
    check_byte_count(len(data), name=name, limits=limits)
    if not data:
        raise ImageError(
            f"{name} is empty.",
            found="0 bytes",
            expected="an image file",
            fix="check that the file was written or downloaded completely",
        )
    image_format = _format_of(data, name, limits, quoted)
    try:
        container = CONTAINERS.get(image_format, _unread)(data)
    except DamagedError as error:
        raise _damaged_header(name, image_format, str(error)) from error
    if container.canvas is not None:
        check_size(container.canvas, name=name, limits=limits)
    image = _header(image_format, io.BytesIO(container.data), name, quoted)
    _check_cost(image, container, name, limits)
    orientation = of_image(image) if container.orientation is None else container.orientation
    size = turned_size(image.size, orientation)
    return EncodedImage(name, size, image_format, container, limits, quoted)


def check_byte_count(count: int, *, name: str, limits: ImageLimits) -> None:
    """Raise ImageError when a file of `count` bytes is too large."""
    if count > limits.max_bytes:
        raise ImageError(
            f"{name} is too large.",
            found=f"{count} bytes",
            expected=f"at most {limits.max_bytes} bytes",
            fix="send a smaller file",
        )


def check_size(size: tuple[int, int], *, name: str, limits: ImageLimits) -> None:
    """Raise ImageError when `size` (width, height) is empty or has too many pixels."""
    width, height = size
    if not 0 < width * height <= limits.max_pixels:
        raise ImageError(
            f"{name} has {'too many' if width * height else 'no'} pixels.",
            found=f"{width} x {height} = {width * height} pixels",
            expected=f"1 to {limits.max_pixels} pixels",
            fix="resize the image",
        )


def load_pixels(image: Image.Image, *, name: str, quoted: bool = True) -> None:
    """Decode the pixels of an opened image in place.

    Raises:
        ImageError: the pixels are not whole or too many, or the image was closed.
        CancelledError: the one who feeds the decoder said so.
    """
    try:
        image.load()
    except VlmforgeError:
        raise
    except MemoryError as error:
        raise ImageError(
            f"{name} does not fit the memory.",
            found=f"{image.width} x {image.height} pixels of mode {image.mode}",
            expected="memory for all its pixels at once",
            fix="make it smaller, or free memory",
        ) from error
    except Exception as error:  # Decoders of untrusted bytes raise nearly anything.
        if _is_closed(image, error):
            raise ImageError(
                f"{name} was closed before its pixels were read.",
                found=f"a closed {type(image).__name__}",
                expected="an image that is loaded, or whose file is open",
                fix="call image.load() before its file is closed, or pass the path",
            ) from error
        found = str(error) or type(error).__name__
        raise _damaged(name, found if quoted else "pixels that do not decode") from error


def _is_closed(image: Image.Image, error: Exception) -> bool:
    if isinstance(error, ValueError) and "closed" in str(error):
        return True
    if not isinstance(image, ImageFile.ImageFile):
        return True  # An image in memory fails to load only when it was closed.
    file: IO[bytes] | None = image.fp
    return file is None or file.closed


class _Feed(io.BytesIO):
    """The bytes that a decoder is fed with. Their end is an error, and so is no longer wanted.

    The end is one also while Pillow is told, for the whole process, to accept truncated files.
    """

    def __init__(
        self, data: bytes, name: str, limits: ImageLimits, cancelled: Cancelled | None
    ) -> None:
        super().__init__(data)
        self._name, self._cancelled = name, cancelled
        self._seconds = limits.decode_s
        self._end = time.monotonic() + limits.decode_s
        self._reads_on = data[:2] in _PLAIN_PPM

    def read(self, size: int | None = -1, /) -> bytes:
        if self._cancelled is not None and self._cancelled():
            raise cancelled_error()
        if time.monotonic() > self._end:
            raise ImageError(
                f"{self._name} takes too long to decode.",
                found=f"not done after {self._seconds:g} s",
                expected="an image that is decoded within that time",
                fix="make it smaller, or save it as PNG or as a JPEG that is not progressive",
            )
        chunk = super().read(size)
        if not chunk and size is not None and size > 0 and not self._reads_on:
            raise OSError("the file ends before its pixels do")
        return chunk


def cancelled_error() -> CancelledError:
    """That an image was no longer wanted when it came to be decoded."""
    return CancelledError(
        "The image was not decoded.",
        found="a request that was cancelled",
        expected="a request that still waits",
        fix="ask again",
    )


def _read_in_pieces(image: Image.Image, feed: _Feed) -> None:
    """Feed the decoder at least `_PIECES` times; none of them empty."""
    if not isinstance(image, ImageFile.ImageFile):
        return
    size = len(feed.getbuffer()) // _PIECES
    image.decodermaxblock = max(_SMALLEST_PIECE, min(ImageFile.MAXBLOCK, size))
    if image.format == "PNG":  # Its reader knows the end of the pixels, not of the file.
        read = image.load_read  # type: ignore[attr-defined]

        def whole(size: int) -> bytes:
            piece: bytes = read(size)
            if not piece:
                raise OSError("the file ends before its pixels do")
            return piece

        image.load_read = whole  # type: ignore[attr-defined]


def _format_of(data: bytes, name: str, limits: ImageLimits, quoted: bool) -> str:
    """Which of the formats it is, by its first bytes."""
    Image.init()
    known = next((one for one in FORMATS if _factory(one, data[:16])), None)
    if known in limits.formats:
        return known
    found = f"{len(data)} bytes that start like no image"
    if known is not None:
        found = f"a {known} file"
    elif quoted:
        found = f"{len(data)} bytes that start with {data[:16]!r}"
    fix = "send the image as PNG or JPEG"
    if known is not None:
        fix += f"; or allow the format: VisionConfig(image_formats=(..., {known!r}))"
    raise ImageError(
        f"{name} is not an image that can be read" + (" here." if known else "."),
        found=found,
        expected="one of " + ", ".join(limits.formats),
        fix=fix,
    )


def _factory(image_format: str, prefix: bytes) -> _Factory | None:
    """Pillow's opener of a format; None when it is not built in or `prefix` is not of it."""
    factory, accept = Image.OPEN.get(image_format, (None, None))
    verdict = accept is not None and accept(prefix)
    return factory if verdict and not isinstance(verdict, str) else None


def _unread(data: bytes) -> Container:
    return Container(data, None)


def _header(image_format: str, file: IO[bytes], name: str, quoted: bool) -> Image.Image:
    """Read the header, as `Image.open` does, but leave its size to our limits.

    `Image.open` would warn or raise by a process-wide setting that is not ours to change.
    """
    factory = Image.OPEN[image_format][0]
    try:
        return factory(file, "")
    except VlmforgeError:
        raise
    except Exception as error:
        found = str(error) if quoted else "a header that makes no sense"
        if isinstance(error, _NOT_THIS_FORMAT):
            raise _damaged_header(name, image_format, found) from error
        raise _damaged(name, found) from error


def _check_cost(image: Image.Image, container: Container, name: str, limits: ImageLimits) -> None:
    check_size(image.size, name=name, limits=limits)
    work = container.passes * max(image.width * image.height, _LEAST_PASS)
    if container.passes > 1 and work > limits.max_work:
        raise ImageError(
            f"{name} is too much work to decode.",
            found=f"{container.passes} scans of {image.width} x {image.height} pixels",
            expected=f"at most {limits.max_work} pixels in all scans together",
            fix="save it as PNG, or as a JPEG that is not progressive",
        )
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    slow = next((tile[0] for tile in tiles if tile[0] not in _C_DECODERS), None)
    if image.format in CONTAINERS and slow is not None:
        raise ImageError(
            f"{name} is compressed in a way that is slow to decode.",
            found=f"a {image.format} file of {slow!r}",
            expected="a BMP that is not compressed",
            fix="send the image as PNG or JPEG",
        )


def _damaged_header(name: str, image_format: str, found: str) -> ImageError:
    return ImageError(
        f"{name} is not an image that can be read.",
        found=f"a damaged {image_format} header: {found}",
        expected="a whole image file",
        fix="write or download the file again, or send the image as PNG or JPEG",
    )


def _damaged(name: str, found: str) -> ImageError:
    return ImageError(
        f"{name} is truncated or damaged.",
        found=found,
        expected="a whole image file",
        fix="write or download the file again",
    )
