"""The vision part on the decoder's own device: what it gives stays there, and nobody waits for it.

Views of one size are run up to `DEVICE_VIEWS` at once, from one place in memory to another, so that
each number of them is captured once and replayed. Features are copied to a pool, where each image's
stay until nobody has them any more. Where the pool is full, they pass through the host.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends import FloatArray, VisionSession
from vlmforge.backends.cuda.device import Device, Memory, Tensor, Work
from vlmforge.backends.cuda.frames import ALIGNMENT, Arrangement, in_a_row, shape_of
from vlmforge.backends.features import (
    DEVICE_VIEWS,
    DeviceFeatures,
    DeviceRows,
    Features,
    Held,
    Run,
)
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays
from vlmforge.engine.interface import IMAGES, PIXEL_VALUES
from vlmforge.engine.manifest import Part
from vlmforge.engine.tensors import TensorSpec
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


class Piece(Memory):
    """A piece of a pool's memory, which it keeps: `size` bytes from `begin` on.

    `give` is told of its begin and end when nobody has it any more.
    """

    def __init__(
        self, memory: Memory, begin: int, size: int, give: Callable[[tuple[int, int]], None]
    ) -> None:
        self._memory, self._begin, self.size = memory, begin, size
        weakref.finalize(self, give, (begin, begin + size)).atexit = False

    @property
    @override
    def address(self) -> int:
        return self._memory.address + self._begin


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

    def take(self, size: int) -> Piece | None:
        """A piece, which comes back when nobody has it; None: there is no such gap."""
        self._take_back()
        for index, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                left = [(begin + size, end)] if end - begin > size else []
                self._free[index : index + 1] = left
                return Piece(self._memory, begin, size, self._returned.append)
        return None

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


class _Kept(Held):
    """Features of a view, or of an image in patches."""

    def __init__(self, device: Device, piece: Piece, shape: tuple[int, int]) -> None:
        self._device, self._piece, self._shape = device, piece, shape
        self.address, self.size, self.row_bytes = piece.address, piece.size, 4 * shape[1]

    @override
    def read(self) -> NDArray[np.float32]:
        return self._device.download(self.address, self._shape, np.dtype(np.float32)).copy()


class Store:
    """Where features stay: see the module. `size`: bytes of the pool."""

    def __init__(self, device: Device, size: int) -> None:
        self._device, self.pool = device, Pool(device.allocate(size), size)

    def keep(self, address: int, rows: int, width: int) -> Features:
        """A copy of rows, which may be overwritten then."""
        size = 4 * rows * width
        piece = self.pool.take(-(-size // ALIGNMENT) * ALIGNMENT)
        if piece is None:
            return self._device.download(address, (rows, width), np.dtype(np.float32)).copy()
        kept = _Kept(self._device, piece, (rows, width))
        self._device.copy(address, kept.address, size)
        return DeviceRows((Run(kept, 0, rows),))


class DeviceVision(VisionSession):
    """A vision part that takes views: see the module.

    Args:
        device: Runs it, and the decoder.
        file, part: Its graph, which takes and gives float32.
        sizes: What it may take of the device's memory.
    """

    views = DEVICE_VIEWS

    def __init__(self, device: Device, file: Path, part: Part, sizes: DeviceFeatures) -> None:
        self._device, self._segment = device, device.segment(file)
        (self._taken,), (self._given,) = part.inputs, part.outputs
        _, self._rows, self._width = shape_of(self._given, {IMAGES: 1})
        self._pixels = device.allocate(sizes.pixels)
        self._features = device.allocate(sizes.features)
        self.store = Store(device, sizes.kept)
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
            size = 4 * self._rows * self._width
            places = (self._features.address + index * size for index in range(len(views)))
            found += [self.store.keep(place, self._rows, self._width) for place in places]
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

    def _warm_up(self) -> None:
        """Run as many views as ever once: what libraries allocate, they allocate now."""
        pixels: NDArray[Any] = np.zeros(shape_of(self._taken, {IMAGES: self.views}), np.float32)
        self._device.upload(self._pixels.address, pixels)
        self._bound(self.views)()


class PatchVision(VisionSession):
    """A vision part that takes patches, as many as an image has: see the module. It runs as it is.

    What it takes and gives lies in the pool, or in memory of its own where that has no room.
    """

    views = DEVICE_VIEWS

    def __init__(self, device: Device, file: Path, part: Part, sizes: DeviceFeatures) -> None:
        self._device, self._segment, self._part = device, device.segment(file), part
        self.store = Store(device, sizes.kept)

    @override
    def encode(
        self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS
    ) -> FloatArray | list[Features]:
        given = {PIXEL_VALUES: pixel_values, **arrays}
        inputs, (output,) = self._part.inputs, self._part.outputs
        pairs = [pair for s in inputs for pair in zip(s.shape, given[s.name].shape, strict=True)]
        dims = {dim: size for dim, size in pairs if isinstance(dim, str)}
        arranged = in_a_row(inputs, [output], dims)
        memory = self.store.pool.take(arranged.size) or self._device.allocate(arranged.size)
        self._run(given, dims, arranged, memory.address)
        images, rows, width = shape_of(output, dims)
        first = memory.address + arranged.offsets[output.name]
        found = [self.store.keep(first + 4 * i * rows * width, rows, width) for i in range(images)]
        if not isinstance(memory, Piece):  # it goes when nothing runs in it any more
            self._device.download(memory.address, (1,), np.dtype(np.uint8))
        return found

    def _run(
        self, given: Arrays, dims: Mapping[str, int], arranged: Arrangement, begin: int
    ) -> None:
        inputs, outputs = self._part.inputs, self._part.outputs
        uploaded = np.empty(arranged.uploaded, np.uint8)
        for spec in inputs:
            arranged.view(uploaded, spec, dims)[:] = given[spec.name]
        self._device.upload(begin, uploaded)

        def tensors(specs: Sequence[TensorSpec]) -> list[Tensor]:
            return [
                Tensor(s.name, s.dtype, shape_of(s, dims), begin + arranged.offsets[s.name])
                for s in specs
            ]

        self._segment.bind(tensors(inputs), tensors(outputs))()
