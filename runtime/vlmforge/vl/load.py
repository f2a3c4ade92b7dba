"""Anything that names or holds an image, to an image."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from PIL import Image, ImageFile

from vlmforge import env
from vlmforge.engine.images.pixels import AS_ENGINE, PixelRange
from vlmforge.errors import ImageError
from vlmforge.vl.data_url import data_url_bytes, without_prefix
from vlmforge.vl.decode import upright_size
from vlmforge.vl.encoded import Cancelled, check_size, open_encoded
from vlmforge.vl.image_limits import DEFAULT_LIMITS, ImageLimits
from vlmforge.vl.local_files import described, read_file, shown
from vlmforge.vl.pillow_images import identity, loaded, pixel_bytes
from vlmforge.vl.stored import StoredImage, pixels_image, stored_pixels

ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

_DIGEST_BYTES = 16
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class OpenedImage:
    """An image whose header is read and within the limits, and whose pixels are not decoded yet.

    Attributes:
        size: Width and height in pixels of what `decode` gives: upright, by the EXIF orientation.
            Of a Pillow image, as `to_rgb` turns it.
        name: The path or URL that it was given by, as `image.filename` has it; None: it has none.
        pixel_range: What it is to be brought to.
        read: Whether its pixels are in memory, or come there for its digest.
    """

    size: tuple[int, int]
    name: str | None
    _pixels: Callable[[Cancelled | None], Image.Image] = field(repr=False)
    _digest: Callable[[], bytes] = field(repr=False)
    _stored: Callable[[], StoredImage] = field(repr=False)
    pixel_range: PixelRange = AS_ENGINE
    read: bool = False

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that identify the content: of an encoded file its bytes, else the pixels.

        A Pillow image that is not loaded yet is loaded for it (ImageError, as of `decode`).
        """
        return self._digest()

    def stored(self) -> StoredImage:
        """The content as plain data, for `reopen` (ImageError: pixels that are not whole)."""
        return self._stored()

    def decode(self, cancelled: Cancelled | None = None) -> Image.Image:
        """The image in its own mode, upright; of a Pillow image, itself.

        Args:
            cancelled: Asked again and again whether the image is no longer wanted. With it,
                decoding is done on one of few threads that all pipelines of the process share;
                without, and where there is nothing to decode, on this one.

        Raises:
            ImageError: the pixels are not whole, or take too long.
            CancelledError: `cancelled` said so.
        """
        if cancelled is None or self.read:
            return self._pixels(cancelled)
        from vlmforge.vl.lanes import decode_in_lane  # threads only where they are needed

        return decode_in_lane(lambda: self._pixels(cancelled), cancelled)


def load_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Load an image in its own mode, upright: the first frame, without colour profile and comments.

    Args:
        source: A path, an `http(s)://`, `file://` or `data:` URL, an encoded file as bytes, a
            uint8 array `[H, W]`, `[H, W, 3]` (RGB) or `[H, W, 4]` (RGBA), or a Pillow image
            (which is returned itself). What a file is, its bytes say: neither its name nor a
            media type is looked at.
        limits: What the image may be and may cost.

    Raises:
        ImageFetchError: a URL that could not be fetched, or leads to a private address.
        ImageError: no such file, or not a whole image within `limits`.
    """
    return open_image(source, limits=limits).decode()


def open_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> OpenedImage:
    """Read an image's header: its size is known, and checked, before any pixel is decoded.

    A URL is fetched whole. `load_image(source)` is `open_image(source).decode()`, which says what
    `source` can be.

    Raises:
        ImageFetchError: a URL that could not be fetched, or leads to a private address.
        ImageError: no such file, or not an image within `limits`.
    """
    if isinstance(source, Image.Image):
        return _from_pillow(source, limits)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, bytes | bytearray | memoryview):
        return _encoded(bytes(source), "The image of the given bytes", limits, quoted=True)
    if isinstance(source, str):
        return _from_text(source, limits)
    if isinstance(source, os.PathLike):
        return _from_file(os.fsdecode(source), limits)
    raise ImageError(
        "An image was given as something that is not one.",
        found=type(source).__name__,
        expected="a path, a URL, bytes, a uint8 array or a Pillow image",
        fix="open the image with PIL.Image.open and pass that",
    )


def reopen(
    stored: StoredImage, *, name: str | None, limits: ImageLimits = DEFAULT_LIMITS
) -> OpenedImage:
    """The image whose content was stored: of the same pixels and the same digest.

    Raises:
        ImageError: it is not one's content, or not within `limits`.
    """
    if stored.pixels is None:
        return _encoded(
            stored.data, "The stored image", limits, name=name, orientation=stored.orientation
        )
    image = pixels_image(stored)
    if name is not None:
        image.filename = name  # type: ignore[attr-defined]
    return _from_pillow(image, limits)


def _encoded(
    data: bytes,
    called: str,
    limits: ImageLimits,
    *,
    name: str | None = None,
    quoted: bool = False,
    orientation: int = 0,
) -> OpenedImage:
    """An encoded file: `called` so in errors, `name` in prompts that spell names.

    `orientation` is EXIF's, if that was read before; 0: it is in the file.
    """
    encoded = open_encoded(data, name=called, limits=limits, quoted=quoted)
    if orientation:
        encoded = encoded.oriented(orientation)

    def pixels(cancelled: Cancelled | None) -> Image.Image:
        image = encoded.decode(cancelled)
        if name is not None:  # as `PIL.Image.open` has it
            image.filename = name  # type: ignore[attr-defined]
        return image

    def digest() -> bytes:
        content, orientation = encoded.content
        return _digest(b"file", content, str(orientation).encode())

    def stored() -> StoredImage:
        content, orientation = encoded.content
        return StoredImage(content, b"", orientation, None)

    return OpenedImage(encoded.size, name, pixels, digest, stored)


def _from_pillow(image: Image.Image, limits: ImageLimits) -> OpenedImage:
    called = "The Pillow image"
    check_size(image.size, name=called, limits=limits)
    if isinstance(image, ImageFile.ImageFile) and image.format == "PNG":
        loaded(image, called)  # Which way up a PNG is may stand behind its pixels.
    name = getattr(image, "filename", "") or None
    return OpenedImage(
        upright_size(image),
        name,
        lambda _: loaded(image, called),
        lambda: _digest_of_pixels(loaded(image, called)),
        lambda: stored_pixels(loaded(image, called)),
        read=True,
    )


def _digest(*parts: bytes) -> bytes:
    return _hashed(*parts).digest(_DIGEST_BYTES)


def _digest_of_pixels(image: Image.Image) -> bytes:
    """That of `_digest`, the pixels being one part."""
    content, (size, pieces) = _hashed(b"pixels", *identity(image)), pixel_bytes(image)
    content.update(size.to_bytes(8, "little"))
    for piece in pieces:
        content.update(piece)
    return content.digest(_DIGEST_BYTES)


def _hashed(*parts: bytes) -> blake3:
    content = blake3()  # of the library's hashes the fastest takes eight times as long
    for part in parts:
        content.update(len(part).to_bytes(8, "little"))
        content.update(part)
    return content


def _from_text(text: str, limits: ImageLimits) -> OpenedImage:
    if text[:5].lower() == "data:":
        data = data_url_bytes(text)
        return _encoded(data, "The image of the data: URL", limits, quoted=True)
    match = _SCHEME.match(text)
    if match is None:
        return _from_path_text(text, limits)
    scheme = match[1].lower()
    if scheme in ("http", "https"):
        return _from_web(text, limits)
    if scheme == "file":
        path = _file_url_path(text) if limits.local_files else text
        return _from_file(path, limits, name=text)
    raise ImageError(
        f"Images are not read from {scheme}:// addresses.",
        found=shown(text),
        expected="http://, https://, file:// or data:",
        fix="download the image and pass its path",
    )


def _from_web(url: str, limits: ImageLimits) -> OpenedImage:
    from vlmforge.vl.fetch import fetch_bytes, shown_url  # http and ssl only where needed

    data = fetch_bytes(url, limits=limits, allow_private=env.private_urls_allowed())
    return _encoded(data, f"The image at {shown_url(url)}", limits, name=url)


def _from_path_text(text: str, limits: ImageLimits) -> OpenedImage:
    try:
        return _from_file(text, limits)
    except ImageError as error:
        raise without_prefix(text) or error from error.__cause__


def _from_file(path: str, limits: ImageLimits, *, name: str | None = None) -> OpenedImage:
    data = read_file(path, limits=limits)
    return _encoded(data, described(path), limits, name=name or path)


def _file_url_path(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, path = parts.netloc, unquote(parts.path)
    except ValueError:  # a bracket that is not closed
        host, path = shown(url[len("file://") :]), ""
    if host.lower() not in ("", "localhost"):
        raise ImageError(
            "A file:// URL names another machine.",
            found=f"host {host!r}",
            expected="file:///absolute/path",
            fix="write three slashes after file:",
        )
    return path


def _from_array(array: NDArray[Any], limits: ImageLimits) -> OpenedImage:
    channels = array.shape[2:]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in ((), (3,), (4,)):
        raise ImageError(
            "An array is not of an image's shape and type.",
            found=f"{array.dtype} of shape {array.shape}",
            expected="uint8 of shape [H, W], [H, W, 3] or [H, W, 4]",
            fix="scale to 0..255 and cast to uint8, channels last",
        )
    height, width = array.shape[:2]
    check_size((width, height), name="The image of the given array", limits=limits)
    return _from_pillow(Image.fromarray(np.ascontiguousarray(array)).copy(), limits)
