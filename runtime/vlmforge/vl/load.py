"""Anything that names or holds an image, to an image."""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmforge import env
from vlmforge.errors import CancelledError, ImageError
from vlmforge.vl.decode import (
    DEFAULT_LIMITS,
    ImageLimits,
    check_byte_count,
    check_size,
    decode_image,
    load_pixels,
    open_header,
    upright_size,
)

Cancelled = Callable[[], bool]
"""Says whether an image is no longer wanted. Called from the thread that decodes."""

ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SHOWN_LENGTH = 120


@dataclass(frozen=True)
class OpenedImage:
    """An image whose header is read and within the limits, and whose pixels are not decoded yet.

    Attributes:
        size: Width and height in pixels of what `decode` gives: upright, by the EXIF orientation.
            Of a Pillow image, as `to_rgb` turns it.
        name: The path or URL that it was given by, as `image.filename` has it; None: it has none.
    """

    size: tuple[int, int]
    name: str | None
    _pixels: Callable[[Cancelled | None], Image.Image]
    _digest: Callable[[], bytes]

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that identify the content: of an encoded file its bytes, else the pixels.

        A Pillow image that is not loaded yet is loaded for it (ImageError, as of `decode`).
        """
        return self._digest()

    def decode(self, cancelled: Cancelled | None = None) -> Image.Image:
        """The image in its own mode, upright; of a Pillow image, itself.

        Args:
            cancelled: Asked while the pixels are decoded whether they are still wanted.

        Raises:
            ImageError: the pixels are not whole.
            CancelledError: `cancelled` said so.
        """
        if cancelled is not None and cancelled():
            raise CancelledError("The image is no longer wanted.")
        return self._pixels(cancelled)


def load_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Load an image in its own mode, upright.

    Args:
        source: A path, an `http(s)://`, `file://` or `data:` URL, an encoded file as bytes, a
            uint8 array `[H, W]`, `[H, W, 3]` (RGB) or `[H, W, 4]` (RGBA), or a Pillow image
            (which is returned itself).
        limits: What the image may cost.

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
        return _encoded(bytes(source), "The image of the given bytes", limits)
    if isinstance(source, str):
        return _from_text(source, limits)
    if isinstance(source, os.PathLike):
        return _from_file(os.fspath(source), limits)
    raise ImageError(
        "An image was given as something that is not one.",
        found=type(source).__name__,
        expected="a path, a URL, bytes, a uint8 array or a Pillow image",
        fix="open the image with PIL.Image.open and pass that",
    )


def _encoded(
    data: bytes, described: str, limits: ImageLimits, name: str | None = None
) -> OpenedImage:
    """An encoded file: `described` in errors, `name` in prompts that spell names."""
    header = open_header(data, name=described, limits=limits)

    def pixels(cancelled: Cancelled | None) -> Image.Image:
        image = decode_image(data, name=described, limits=limits)
        if name is not None:  # as `PIL.Image.open` has it
            image.filename = name  # type: ignore[attr-defined]
        return image

    return OpenedImage(upright_size(header), name, pixels, lambda: _digest(b"file", data))


def _from_pillow(image: Image.Image, limits: ImageLimits) -> OpenedImage:
    described = "The Pillow image"
    check_size(image.size, name=described, limits=limits)

    def pixels(_: Cancelled | None = None) -> Image.Image:
        load_pixels(image, name=described)
        return image

    def digest() -> bytes:
        facts = (image.mode, image.size, image.info.get("transparency"), upright_size(image))
        palette = bytes(pixels().getpalette("RGBA") or ()) if "P" in image.mode else b""
        return _digest(b"pixels", repr(facts).encode(), palette, image.tobytes())

    name = getattr(image, "filename", "") or None
    return OpenedImage(upright_size(image), name, pixels, digest)


def _digest(*parts: bytes) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for part in parts:
        content.update(len(part).to_bytes(8, "little"))
        content.update(part)
    return content.digest()


def _from_text(text: str, limits: ImageLimits) -> OpenedImage:
    if text[:5].lower() == "data:":
        return _encoded(_data_url_bytes(text), "The image of the data: URL", limits)
    match = _SCHEME.match(text)
    if match is None:
        return _from_file(text, limits)
    scheme = match[1].lower()
    if scheme in ("http", "https"):
        return _from_web(text, limits)
    if scheme == "file":
        return _from_file(_file_url_path(text), limits, name=text)
    raise ImageError(
        f"Images are not read from {scheme}:// addresses.",
        found=_shown(text),
        expected="http://, https://, file:// or data:",
        fix="download the image and pass its path",
    )


def _from_web(url: str, limits: ImageLimits) -> OpenedImage:
    from vlmforge.vl.fetch import fetch_bytes, shown_url  # http and ssl only where needed

    data = fetch_bytes(url, limits=limits, allow_private=env.private_urls_allowed())
    return _encoded(data, f"The image at {shown_url(url)}", limits, url)


def _from_file(path: str, limits: ImageLimits, name: str | None = None) -> OpenedImage:
    described = f"The image file {_shown(path)}"
    try:
        data, size = _read_file(Path(path), limits.max_bytes)
    except FileNotFoundError as error:
        raise _unreadable(path, f"{described} does not exist.", "no such file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _unreadable(path, f"{described} cannot be read.", reason) from error
    check_byte_count(size, name=described, limits=limits)
    return _encoded(data, described, limits, name or path)


def _read_file(path: Path, max_bytes: int) -> tuple[bytes, int]:
    """At most `max_bytes` of a file, and its size."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # A pipe or a device would block or never end.
        raise OSError(errno.EINVAL, "not a regular file")
    with path.open("rb") as file:
        return file.read(max_bytes), status.st_size


def _unreadable(path: str, summary: str, found: str) -> ImageError:
    fix = "check the path and its permissions"
    if any(character.isspace() for character in path):
        fix += "; if this text is a prompt, pass it in the prompt's place, before the images"
    return ImageError(
        summary,
        found=found,
        expected="the path of a readable image file, or a URL",
        fix=fix,
    )


def _file_url_path(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost"):
        raise ImageError(
            "A file:// URL names another machine.",
            found=f"host {parts.netloc!r}",
            expected="file:///absolute/path",
            fix="write three slashes after file:",
        )
    return unquote(parts.path)


def _data_url_bytes(url: str) -> bytes:
    """Payload of a `data:` URL (RFC 2397), base64 or percent-encoded."""
    header, comma, payload = url[len("data:") :].partition(",")
    media_type, *parameters = (part.strip().lower() for part in header.split(";"))
    if not comma or not media_type.startswith("image/"):
        raise ImageError(
            "A data: URL does not hold an image.",
            found=_shown(f"data:{header}{comma}"),
            expected="data:image/...;base64,...",
            fix="name the image's media type, and put a comma before the data",
        )
    data = unquote_to_bytes(payload)
    if "base64" not in parameters:
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(
            "The base64 of a data: URL is damaged.",
            found=f"{error}, in {len(data)} characters",
            expected="the standard base64 alphabet, padded with = to a multiple of 4",
            fix="encode the whole file with base64.b64encode; check that nothing cut it",
        ) from error


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
    image = Image.fromarray(np.ascontiguousarray(array)).copy()
    return _from_pillow(image, limits)


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "..."
