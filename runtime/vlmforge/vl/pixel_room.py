"""Room for the pixels of pictures, so that many large ones at once do not take all memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vlmforge.errors import ImageError
from vlmforge.limits import available_memory, return_freed_memory
from vlmforge.vl.encoded import Cancelled, cancelled_error
from vlmforge.vl.image_limits import DEFAULT_LIMITS

BYTES_PER_PIXEL = 10
"""While an image is decoded, turned and resized: measured at 8.7, of Pillow's 4 bytes a pixel."""

LARGE = 8 << 20
"""Pixels of an image that takes longer than to look for memory, and to give it back."""

_ASK_S = 0.05


class PixelRoom:
    """Images together have at most `most` pixels in memory, or one of them has it alone.

    Who comes first has room first, so that a large image is not kept waiting by small ones.
    """

    def __init__(self, most: int = DEFAULT_LIMITS.max_pixels) -> None:
        self._most = most
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._held = 0
        self._turn, self._freed = threading.Lock(), threading.Condition()

    @contextmanager
    def hold(self, size: tuple[int, int], name: str | None, cancelled: Cancelled) -> Iterator[None]:
        """Room for an image of this width and height, within the block.

        Raises:
            ImageError: there is not the memory for it, in other images' absence too.
            CancelledError: `cancelled` said so while it waited.
        """
        pixels = size[0] * size[1]
        self._take(pixels, cancelled)
        try:
            if pixels >= LARGE:
                _check_memory(size, name)
            yield
        finally:
            with self._freed:
                self._held -= pixels
                self._freed.notify_all()
            if pixels >= LARGE:
                return_freed_memory()

    def _take(self, pixels: int, cancelled: Cancelled) -> None:
        while not self._turn.acquire(timeout=_ASK_S):
            if cancelled():
                raise cancelled_error()
        try:
            with self._freed:
                while self._held and self._held + pixels > self._most:
                    if cancelled():
                        raise cancelled_error()
                    self._freed.wait(_ASK_S)
                self._held += pixels
        finally:
            self._turn.release()


PIXEL_ROOM = PixelRoom()
"""Of all pipelines of this process."""


def _check_memory(size: tuple[int, int], name: str | None) -> None:
    needed, room = BYTES_PER_PIXEL * size[0] * size[1], available_memory()
    if needed > room.bytes:
        raise ImageError(
            f"{name or 'The image'} does not fit the memory.",
            found=f"{size[0]} x {size[1]} pixels, {needed / 1e9:.2f} GB while they are decoded",
            expected=f"at most {room.bytes / 1e9:.2f} GB, by {room.limit}",
            fix="make it smaller, or free memory",
        )
