"""Image features, computed in batches and kept by the images' content."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby

import numpy as np

from vlmforge.backends import FloatArray
from vlmforge.backends.features import VIEW_PATCHES, Features, chosen, joined
from vlmforge.engine.images.patch_inputs import Grid
from vlmforge.vl.prepared import PreparedImage

Encoder = Callable[[FloatArray, Grid | None], FloatArray | Sequence[Features]]
USUAL_BUDGET = 128 << 20
_View = tuple[PreparedImage, FloatArray]


class FeatureCache:
    """Features of the images seen last, at most `budget` bytes of them (least recently used go).

    One thread calls `get`; any may call `known`.

    Args:
        encode: Views to their rows `[n, rows, width]`, all of images of one grid, if they have one.
        batch: Views in one run of `encode`.
        budget: Bytes of features that are kept for later, beside those that requests have.
    """

    def __init__(self, encode: Encoder, *, batch: int, budget: int = USUAL_BUDGET) -> None:
        self._encode, self._batch, self._budget = encode, batch, budget
        self.encoded = 0  # images, ever
        self._view_bytes = 0  # of the features of one, lately
        self._features: OrderedDict[bytes, Features] = OrderedDict()

    def known(self, digest: bytes) -> Features | None:
        """Features `[tokens, hidden]` that are kept; None if they are not.

        Who asks uses them, also where the image's tokens will be found in the cache.
        """
        found = self._features.get(digest)
        with suppress(KeyError):  # it may go at this moment
            self._features.move_to_end(digest)
        return found

    def keep(self, digest: bytes, features: Features) -> None:
        """Take in features that were computed earlier. From the thread that calls `get`."""
        self._features.setdefault(digest, features)
        self._evict()

    def let_go(self) -> None:
        """Forget all of them. From the thread that calls `get`, at its end."""
        self._features.clear()

    @property
    def bytes(self) -> int:
        """Bytes of the features that are kept."""
        return sum(features.nbytes for features in list(self._features.values()))

    def get(
        self, images: Sequence[PreparedImage], ahead: Sequence[PreparedImage] = ()
    ) -> tuple[list[Features], int]:
        """Features `[tokens, hidden]` of each image, and how many were known already.

        The views of all unknown images are run together, at most `batch` at once (of images in
        patches, as many of one grid as have that many times `VIEW_PATCHES`); images that will
        be asked for next (`ahead`) fill up the last run if all their views fit in. When a run with
        such images fails, the images that are needed are run without them.
        """
        images = [i if i.digest in self._features else i.whole() for i in images]
        ahead = [image for image in ahead if image.later is None]
        for image in images:
            if image.features is not None:
                self._features.setdefault(image.digest, image.features)
        known = sum(image.digest in self._features for image in images)
        unknown = self._unknown(images)
        fillers = self._fillers(unknown, ahead)
        try:
            self._run(unknown + fillers)
        except Exception:
            if not fillers:
                raise
            # Perhaps one of another request's images did it: this one must not pay for it.
            self._run(self._unknown(images))
        found = []
        for image in images:
            self._features.move_to_end(image.digest)
            found.append(self._features[image.digest])
        self._evict()
        return found, known

    def _evict(self) -> None:
        over = self.bytes - self._budget
        while over > 0:
            _, features = self._features.popitem(last=False)
            over -= features.nbytes

    def _fillers(
        self, unknown: list[PreparedImage], ahead: Sequence[PreparedImage]
    ) -> list[PreparedImage]:
        if not unknown or not self._budget:  # they would not be there when they are asked for
            return []
        grid = unknown[-1].grid
        views = sum(len(image.pixel_values) for image in unknown if image.grid == grid)
        spare = -views % self._at_once(unknown[-1])
        if self._view_bytes:  # more would not be there any more when they are asked for
            spare = min(spare, self._budget // self._view_bytes - views)
        wanted, fillers = {image.digest for image in unknown}, list[PreparedImage]()
        for image in self._unknown(ahead) if spare > 0 else ():
            alike = image.digest not in wanted and image.grid == grid
            if alike and 0 < len(image.pixel_values) <= spare:
                fillers.append(image)
                spare -= len(image.pixel_values)
        return fillers

    def _unknown(self, images: Sequence[PreparedImage]) -> list[PreparedImage]:
        found = {image.digest: image for image in images if image.digest not in self._features}
        return list(found.values())

    def _at_once(self, image: PreparedImage) -> int:
        """Views of images like this one in a run."""
        if image.grid is None:
            return self._batch
        patches = math.prod(image.pixel_values.shape[1:3])
        return max(1, self._batch * VIEW_PATCHES // max(1, patches))

    def _groups(self, views: list[_View]) -> Iterator[list[_View]]:
        for _, alike in groupby(views, lambda pair: pair[0].grid):
            left = list(alike)
            most = self._at_once(left[0][0])
            yield from (left[start : start + most] for start in range(0, len(left), most))

    def _run(self, images: list[PreparedImage]) -> None:
        views = [(image, view) for image in images for view in image.pixel_values]
        views.sort(key=lambda pair: pair[0].grid or ())  # stable: views of an image stay together
        done: list[Features] = []  # of the image whose views are being run
        for group in self._groups(views):
            features = self._encode(_stacked([view for _, view in group]), group[0][0].grid)
            for (image, _), rows in zip(group, features, strict=True):
                done.append(rows)
                self._view_bytes = rows.nbytes
                if len(done) == len(image.pixel_values):
                    whole = _own(done, alone=len(group) == 1)
                    self._features[image.digest] = (
                        whole if image.rows is None else chosen(whole, image.rows)
                    )
                    self.encoded += 1
                    done = []


def _stacked(views: list[FloatArray]) -> FloatArray:
    return views[0][None] if len(views) == 1 else np.stack(views)


def _own(views: list[Features], *, alone: bool) -> Features:
    """Of one image, which keep no others in memory; `alone`: these are all that was run."""
    whole = joined(views)
    shared = len(views) == 1 and not alone
    return whole.copy() if shared and isinstance(whole, np.ndarray) else whole
