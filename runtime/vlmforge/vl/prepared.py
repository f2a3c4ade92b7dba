"""An image as the vision part takes it, and what identifies its features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from msgspec import Struct

from vlmforge.backends import FloatArray
from vlmforge.backends.features import Features
from vlmforge.engine.images.patch_inputs import Grid
from vlmforge.engine.images.pixels import Rows
from vlmforge.kv.cache import Keys


class PreparedImage(Struct, frozen=True, eq=False, weakref=True):
    """An image, preprocessed.

    Attributes:
        pixel_values: `[views, 3, H, W]`, or `[1, tokens, patches, values]` of an image that is in
            patches; without views where the features are known.
        digest: Identifies the image's features: made of its content and rows.
        rows: int64 `[tokens]`, which rows of all its views become tokens; None: all, in order.
        features: `[tokens, hidden]` of an image that was encoded before; None: to be encoded.
        later: Makes the image, should its pixels be needed after all; None: they are here, or what
            is made of them is.
        grid: Tokens down and across, where the image policy has them in one.
    """

    pixel_values: FloatArray
    digest: bytes
    rows: Rows | None = None
    features: Features | None = None
    later: Callable[[], PreparedImage] | None = None
    grid: Grid | None = None

    def whole(self) -> PreparedImage:
        """The image with its pixels or features (ImageError: it cannot be decoded)."""
        return self if self.later is None or self.features is not None else self.later()

    def without_features(self) -> PreparedImage:
        """The same one, to be made again should it be needed, where it can be."""
        return self if self.later is None else deferred(self.digest, self.later)


_NO_VIEWS: FloatArray = np.empty((0, 3, 0, 0), np.float32)


def prepare(
    pixel_values: FloatArray,
    rows: Rows | None = None,
    digest: bytes | None = None,
    grid: Grid | None = None,
) -> PreparedImage:
    """Attach the digest that identifies an image by its content: `digest`, or the pixel values'."""
    if digest is None:
        content = hashlib.blake2b(repr(pixel_values.shape).encode(), digest_size=16)
        content.update(pixel_values.tobytes())
        digest = content.digest()
    return PreparedImage(pixel_values, features_digest(digest, rows, grid), rows, grid=grid)


def encoded(
    digest: bytes, features: Features, later: Callable[[], PreparedImage] | None = None
) -> PreparedImage:
    """An image whose `features` are known by its `features_digest`: it needs no pixels.

    `later` makes it of its pixels, should the features be let go.
    """
    return PreparedImage(_NO_VIEWS, digest, None, features, later)


def deferred(digest: bytes, later: Callable[[], PreparedImage]) -> PreparedImage:
    """An image, known by its `features_digest`, that will hardly be needed; `later` makes it."""
    return PreparedImage(_NO_VIEWS, digest, later=later)


def features_digest(content: bytes, rows: Rows | None, grid: Grid | None = None) -> bytes:
    """16 bytes that identify an image's features on one engine: its content, rows and grid."""
    if rows is None:
        return content
    # Pictures of one colour and of different sizes can have equal pixels and other rows.
    shape = b"" if grid is None else repr(grid).encode("ascii")
    return hashlib.blake2b(content + rows.tobytes() + shape, digest_size=16).digest()


def row_keys(image: PreparedImage, length: int) -> Keys:
    """Keys of the `length` rows of an image: negative, so that no text token has the same."""
    stream = hashlib.shake_128(image.digest).digest(8 * length)
    return np.frombuffer(stream, np.int64) | np.iinfo(np.int64).min
