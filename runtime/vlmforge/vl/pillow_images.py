"""Pillow images as users give them: often not loaded yet, the same one in several prompts."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator

from PIL import Image

from vlmforge.vl.encoded import load_pixels
from vlmforge.vl.orientation import of_image

_PIECE_BYTES = 1 << 20  # so much memory comes again and again from what was freed before


class _Locks:
    """A lock for each image that is in use: two threads must not load one at a time.

    A forked process has none of the threads that may have held one, so it begins anew.
    """

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._own = threading.Lock()
        self._locks: weakref.WeakValueDictionary[int, threading.Lock] = (
            weakref.WeakValueDictionary()
        )

    def of(self, image: Image.Image) -> threading.Lock:
        """The lock of an image, for as long as somebody holds it."""
        with self._own:
            return self._locks.setdefault(id(image), threading.Lock())


_locks = _Locks()


def loaded(image: Image.Image, name: str) -> Image.Image:
    """The image itself, with its pixels read.

    Raises:
        ImageError: the pixels are not whole, or the image was closed.
    """
    with _locks.of(image):
        load_pixels(image, name=name)
    return image


def identity(image: Image.Image) -> tuple[bytes, bytes]:
    """All of a loaded image beside its pixels that decides its colours."""
    facts = (image.mode, image.size, image.info.get("transparency"), of_image(image))
    palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
    return repr(facts).encode(), bytes(palette or ())


def pixel_bytes(image: Image.Image) -> tuple[int, Iterator[bytes]]:
    """How many bytes the pixels of a loaded image are, and these, in pieces of whole rows.

    All of them in one piece would be new memory each time, and the system gives that page by page.
    """
    width, height = image.size
    row = len(image.crop((0, 0, width, 1)).tobytes())
    rows = max(1, _PIECE_BYTES // row)
    tops = range(0, height, rows)
    pieces = (image.crop((0, y, width, min(height, y + rows))).tobytes() for y in tops)
    return row * height, pieces
