"""Image features, computed in batches and kept by the images' content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmforge.backends import FloatArray
from vlmforge.slots import Keys

Encoder = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image, preprocessed: `pixel_values` `[views, 3, H, W]` and their digest."""

    pixel_values: FloatArray
    digest: bytes


def prepare(pixel_values: FloatArray) -> PreparedImage:
    """Attach the digest that identifies an image by its content."""
    content = hashlib.blake2b(repr(pixel_values.shape).encode(), digest_size=16)
    content.update(pixel_values.tobytes())
    return PreparedImage(pixel_values, content.digest())


def row_keys(image: PreparedImage, length: int) -> Keys:
    """Keys of the `length` rows of an image: negative, so that no text token has the same."""
    stream = hashlib.shake_128(image.digest).digest(8 * length)
    return np.frombuffer(stream, np.int64) | np.iinfo(np.int64).min


class FeatureCache:
    """Features of the images seen last, at most `capacity` of them (least recently used go)."""

    def __init__(self, encode: Encoder, *, batch: int, capacity: int = 64) -> None:
        self._encode, self._batch, self._capacity = encode, batch, capacity
        self._features: OrderedDict[bytes, FloatArray] = OrderedDict()

    def get(
        self, images: Sequence[PreparedImage], ahead: Sequence[PreparedImage] = ()
    ) -> tuple[list[FloatArray], int]:
        """Features `[tokens, hidden]` of each image, and how many were known already.

        Unknown images are encoded at most `batch` in one run; images that will be asked for next
        (`ahead`) fill up the last run.
        """
        known = sum(image.digest in self._features for image in images)
        unknown = self._unknown(images)
        if spare := -len(unknown) % self._batch:
            extra = [i for i in self._unknown(ahead) if i.digest not in {u.digest for u in unknown}]
            unknown += extra[:spare]
        self._run(unknown)
        found = []
        for image in images:
            self._features.move_to_end(image.digest)
            found.append(self._features[image.digest])
        while len(self._features) > self._capacity:
            self._features.popitem(last=False)
        return found, known

    def _unknown(self, images: Sequence[PreparedImage]) -> list[PreparedImage]:
        found = {image.digest: image for image in images if image.digest not in self._features}
        return list(found.values())

    def _run(self, images: list[PreparedImage]) -> None:
        for start in range(0, len(images), self._batch):
            group = images[start : start + self._batch]
            features = self._encode(np.concatenate([image.pixel_values for image in group]))
            views = [len(image.pixel_values) for image in group]
            split = np.split(features, np.cumsum(views)[:-1])
            for image, rows in zip(group, split, strict=True):
                self._features[image.digest] = rows.reshape(-1, rows.shape[-1])
