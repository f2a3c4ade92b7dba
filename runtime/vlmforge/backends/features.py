"""Features of images: rows of an array, or rows that lie in a device's memory.

Those of a device are handled as arrays are, without being touched: rows are chosen and put one
behind the other by their addresses. Who needs the numbers gets them by `np.asarray`, on the thread
that runs the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.engine.images.pixels import Rows
from vlmforge.engine.manifest import Manifest

DEVICE_VIEWS = 8
"""Views that a device encodes at once: of a 336-pixel tower, 8 in four times the time of one."""
VIEW_PATCHES = 1024
"""Patches that count as one view, where images are in patches and of any size."""
_WAITING_VIEWS = 16
_ROUND = 256
# What a tower calculates in between takes less than so many times a view's features in 16 bits.
_IN_BETWEEN = 6


class Held(Protocol):
    """A piece of a device's memory with rows in it, kept as long as this is.

    Attributes:
        address: Of the first row.
        size: Bytes that it takes.
        row_bytes: Of each row.
    """

    address: int
    size: int
    row_bytes: int

    def read(self) -> NDArray[np.float32]:
        """A copy of all rows `[n, width]`. On the thread that runs the device."""


class Run(NamedTuple):
    """Rows that lie one behind the other."""

    held: Held
    start: int
    rows: int

    @property
    def address(self) -> int:
        """Of the first one."""
        return self.held.address + self.start * self.held.row_bytes

    @property
    def nbytes(self) -> int:
        """Of all."""
        return self.rows * self.held.row_bytes


class DeviceRows(Struct, frozen=True, eq=False):
    """Rows of features that lie in a device's memory, in order."""

    runs: tuple[Run, ...]

    def __len__(self) -> int:
        return sum(run.rows for run in self.runs)

    @property
    def nbytes(self) -> int:
        """Of the memory that is kept for them, whether all of it is among them or not."""
        return sum({id(run.held): run.held.size for run in self.runs}.values())

    def __getitem__(self, part: slice) -> DeviceRows:
        start, stop, _ = slice(part.start, part.stop).indices(len(self))
        return DeviceRows(tuple(_cut(self.runs, start, stop)))

    def chosen(self, rows: Rows) -> DeviceRows:
        """The rows with these numbers."""
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        bounds = itertools.pairwise([0, *breaks.tolist(), len(rows)])
        alike = ((int(rows[a]), b - a) for a, b in bounds if b > a)
        parts = (_cut(self.runs, first, first + count) for first, count in alike)
        return DeviceRows(tuple(itertools.chain.from_iterable(parts)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.float32]:
        if copy is False:
            raise ValueError("rows in a device's memory cannot be seen without a copy")
        read = {id(run.held): run.held.read() for run in self.runs}
        parts = [read[id(run.held)][run.start : run.start + run.rows] for run in self.runs]
        whole = np.concatenate(parts)
        return whole if dtype is None else whole.astype(dtype)


Features: TypeAlias = NDArray[np.float32] | DeviceRows
"""Rows `[n, width]`."""


def _cut(runs: Sequence[Run], start: int, stop: int) -> Iterator[Run]:
    """The rows `start .. stop` of all of them."""
    at = 0
    for run in runs:
        first, last = max(start, at) - at, min(stop, at + run.rows) - at
        if first < last:
            yield Run(run.held, run.start + first, last - first)
        at += run.rows


def joined(parts: Sequence[Features]) -> Features:
    """All rows, one part behind the other; on the device if all are. A part alone is not copied."""
    if len(parts) == 1:
        return parts[0]
    runs = [part.runs for part in parts if isinstance(part, DeviceRows)]
    if len(runs) == len(parts):
        return DeviceRows(tuple(itertools.chain.from_iterable(runs)))
    return np.concatenate([np.asarray(part) for part in parts])


def chosen(features: Features, rows: Rows) -> Features:
    """The rows with these numbers."""
    return features.chosen(rows) if isinstance(features, DeviceRows) else features[rows]


@runtime_checkable
class ManyViews(Protocol):
    """A `VisionSession` to which several views at once come cheaper.

    Attributes:
        views: So many.
    """

    views: int


class DeviceFeatures(Struct, frozen=True):
    """What a vision part takes of a device's memory beside its weights, in bytes.

    Attributes:
        pixels: Of `DEVICE_VIEWS` views.
        features: Of theirs.
        kept: For features of images that were seen, and of those whose prompts are being run; where
            images are in patches, for those that are run too.
        between: For what is calculated.
    """

    pixels: int
    features: int
    kept: int
    between: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.pixels + self.features + self.kept + self.between


def device_features(manifest: Manifest, budget: int) -> DeviceFeatures | None:
    """Of an engine whose features stay on the device; None: they pass through the host.

    They stay where one device has all of the engine, and attention runs between graphs. `budget`:
    bytes of those of images that were seen.
    """
    chained = any(part.chain is not None for part in manifest.parts)
    if not chained or manifest.kv.page_size is None or manifest.parallel.tp > 1:
        return None
    row = 4 * manifest.decode.hidden_size * manifest.decode.feature_layers
    patches = manifest.image.patch_inputs
    if patches is not None:
        tokens = DEVICE_VIEWS * VIEW_PATCHES // patches.group
        token = 4 * patches.group * (patches.values + 2 * patches.angles)
        between = tokens * _IN_BETWEEN * row // 2
        return DeviceFeatures(0, 0, budget + tokens * (token + 3 * row), between)
    height, width = manifest.image.view_size
    rows = manifest.image.view_rows(manifest.decode.tokens_per_image)
    view = -(-rows * row // _ROUND) * _ROUND
    return DeviceFeatures(
        DEVICE_VIEWS * 12 * height * width,
        DEVICE_VIEWS * view,
        budget + _WAITING_VIEWS * view,
        DEVICE_VIEWS * _IN_BETWEEN * view // 2,
    )
