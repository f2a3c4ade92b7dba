"""The vision part on the decoder's own device: what it gives stays there, and nobody waits for it.

Views are run up to `DEVICE_VIEWS` at once, from one place in memory to another, so that each number
of them is captured once and replayed. From there features are copied to a pool, where each image's
stay until nobody has them any more. Where the pool is full, they pass through the host.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends import FloatArray, VisionSession
from vlmforge.backends.cuda.device import Device, Memory, Tensor, Work
from vlmforge.backends.cuda.frames import ALIGNMENT, shape_of
from vlmforge.backends.features import (
    DEVICE_VIEWS,
    DeviceFeatures,
    DeviceRows,
    Features,
    Held,
    Run,
)
from vlmforge.engine.chain import TensorSpec
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays
from vlmforge.engine.interface import IMAGES, PIXEL_VALUES
from vlmforge.engine.manifest import Part
from vlmforge.errors import EngineError
from vlmforge.ort import ort
from vlmforge_plugins.errors import PluginError

logger = logging.getLogger("vlmforge")


@dataclass(frozen=True, slots=True)
class HostVision(VisionSession):
    """A vision part whose features pass through the host."""

    session: ort.InferenceSession

    @override
    def encode(self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS) -> FloatArray:
        (features,) = self.session.run(None, {PIXEL_VALUES: pixel_values, **arrays})
        return np.asarray(features, np.float32)


class Pool:
    """Pieces of a memory, the first that is large enough each. One thread takes; any gives back.

    What is given back may be used again at once: all that is done with it is done in order.
    """

    def __init__(self, memory: Memory, size: int) -> None:
        self._memory = memory
        self._free = [(0, size)]  # begin and end of each gap, in order
        self._returned: deque[tuple[int, int]] = deque()  # a garbage collector may add to it

    @property
    def free(self) -> int:
        """Bytes that nobody has."""
        self._take_back()
        return sum(end - begin for begin, end in self._free)

    def take(self, size: int) -> tuple[int, tuple[int, int]] | None:
        """The address of a piece, and what is given back for it; None: there is no such gap."""
        self._take_back()
        for index, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                left = [(begin + size, end)] if end - begin > size else []
                self._free[index : index + 1] = left
                return self._memory.address + begin, (begin, begin + size)
        return None

    def give(self, piece: tuple[int, int]) -> None:
        """Nobody has it any more."""
        self._returned.append(piece)

    def _take_back(self) -> None:
        if not self._returned:
            return
        while self._returned:
            self._free.append(self._returned.popleft())
        joined = list[tuple[int, int]]()
        for begin, end in sorted(self._free):
            if joined and joined[-1][1] == begin:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((begin, end))
        self._free = joined


class _View(Held):
    """The features of a view; its piece of the pool goes back with it."""

    def __init__(
        self, device: Device, pool: Pool, taken: tuple[int, tuple[int, int]], rows: int, width: int
    ) -> None:
        self.address, piece = taken
        self.size, self.row_bytes = piece[1] - piece[0], 4 * width
        self._device, self._shape = device, (rows, width)
        weakref.finalize(self, pool.give, piece).atexit = False

    @override
    def read(self) -> NDArray[np.float32]:
        return self._device.download(self.address, self._shape, np.dtype(np.float32)).copy()


class DeviceVision(VisionSession):
    """See the module.

    Args:
        device: Runs it, and the decoder.
        file, part: Its graph, which takes and gives float32.
        sizes: What it may take of the device's memory.
    """

    views = DEVICE_VIEWS

    def __init__(self, device: Device, file: Path, part: Part, sizes: DeviceFeatures) -> None:
        self._device, self._segment = device, device.segment(file)
        (self._taken,), (self._given,) = part.inputs, part.outputs
        _, rows, width = shape_of(self._given, {IMAGES: 1})
        self._rows, self._width = rows, width
        self._view_bytes = -(-4 * rows * width // ALIGNMENT) * ALIGNMENT
        self._pixels = device.allocate(sizes.pixels)
        self._features = device.allocate(sizes.features)
        self._pool = Pool(device.allocate(sizes.kept), sizes.kept)
        self._works: dict[int, Work] = {}
        self._warm_up()

    @override
    def encode(
        self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS
    ) -> FloatArray | list[Features]:
        del arrays
        found = list[Features]()
        for start in range(0, len(pixel_values), self.views):
            views = np.ascontiguousarray(pixel_values[start : start + self.views], np.float32)
            self._device.upload(self._pixels.address, views)
            self._run(len(views))
            found += [self._kept(index) for index in range(len(views))]
        return found

    def _run(self, views: int) -> None:
        if (work := self._works.get(views)) is not None:
            work()
            return
        work = self._bound(views)
        work()
        try:
            self._works[views] = self._device.captured(work)
        except (EngineError, PluginError) as error:  # it runs as well, only not as fast
            logger.warning("a run of the vision part could not be captured: %s", error)
            self._works[views] = work

    def _bound(self, views: int) -> Work:
        def tensor(spec: TensorSpec, memory: Memory) -> Tensor:
            shape = shape_of(spec, {IMAGES: views})
            return Tensor(spec.name, spec.dtype, shape, memory.address)

        taken = tensor(self._taken, self._pixels)
        return self._segment.bind([taken], [tensor(self._given, self._features)])

    def _kept(self, index: int) -> Features:
        """The features of a view that has just been run, where they stay."""
        shape = self._rows, self._width
        size = 4 * math.prod(shape)
        at = self._features.address + index * size
        taken = self._pool.take(self._view_bytes)
        if taken is None:
            return self._device.download(at, shape, np.dtype(np.float32)).copy()
        view = _View(self._device, self._pool, taken, *shape)
        self._device.copy(at, view.address, size)
        return DeviceRows((Run(view, 0, self._rows),))

    def _warm_up(self) -> None:
        """Run as many views as ever once: what libraries allocate, they allocate now."""
        pixels: NDArray[Any] = np.zeros(shape_of(self._taken, {IMAGES: self.views}), np.float32)
        self._device.upload(self._pixels.address, pixels)
        self._bound(self.views)()
