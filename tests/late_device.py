"""The processor in the place of a GPU, late: what is enqueued is done when it is waited for.

Of several ranks the first one's is: for what others enqueue nobody waits. A thread of theirs does
it (`late_rank`), as soon as the first rank comes to where they meet.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends import Communicator, cuda
from vlmforge.backends.cuda.device import (
    Arriving,
    Mark,
    MeetingPlace,
    Segment,
    SumAndNorm,
    T,
    Tensor,
    Work,
)
from vlmforge.backends.fake import HostBackend, HostDevice, HostMark, NumpyKernels
from vlmforge.backends.ranks import processes
from vlmforge.engine.chain import Collective
from vlmforge_plugins.cached_attention.config import Config
from vlmforge_plugins.cached_attention.kernel_store import Loaded
from vlmforge_plugins.cached_attention.launcher import Boxes, Kernels, Params
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.gated_activation import launcher as gated
from vlmforge_plugins.token_choice import launcher as choice


@dataclass(frozen=True)
class _Kernels(Kernels):
    inner: Kernels
    later: Callable[[Work], None]

    @override
    def tile_map(self, boxes: Boxes) -> bytes:
        return self.inner.tile_map(boxes)

    @override
    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        self.later(lambda: self.inner.launch(launch, params, stream))


@dataclass(frozen=True)
class _Gates(gated.Kernels):
    inner: gated.Kernels
    later: Callable[[Work], None]
    overlap: bool = False

    @override
    def launch(self, launch: Launch, params: gated.Params, stream: int) -> None:
        self.later(lambda: self.inner.launch(launch, params, stream))


@dataclass(frozen=True)
class _Choosers(choice.Kernels):
    inner: choice.Kernels
    later: Callable[[Work], None]
    overlap: bool = False

    @override
    def launch(self, launch: Launch, params: choice.Params, stream: int) -> None:
        self.later(lambda: self.inner.launch(launch, params, stream))


@dataclass(frozen=True)
class _Segment(Segment):
    inner: Segment
    later: Callable[[Work], None]

    @override
    def bind(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Work:
        work = self.inner.bind(inputs, outputs)
        return lambda: self.later(work)


@dataclass(frozen=True)
class _Meetings(MeetingPlace):
    inner: MeetingPlace
    later: Callable[[Work], None]

    @override
    def bind(self, call: Collective, given: Tensor, out: Tensor) -> Work:
        work = self.inner.bind(call, given, out)
        return lambda: self.later(work)

    @override
    def bind_norm(self, call: SumAndNorm) -> Work:
        work = self.inner.bind_norm(call)
        return lambda: self.later(work)

    @override
    def broadcast(self, given: int, out: int, count: int) -> Work:
        work = self.inner.broadcast(given, out, count)
        return lambda: self.later(work)


_PASSED = itertools.count(1.0)  # seconds do not matter, their order does


class _Mark(Mark):
    passed: HostMark

    def pass_now(self) -> None:
        self.passed = HostMark(next(_PASSED))

    @override
    def since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Mark)
        return self.passed.since(earlier.passed)


class _Copy(Arriving):
    def __init__(self, device: LateDevice, read: Callable[[], NDArray[np.uint8]]) -> None:
        self._device, self._read = device, read
        self._found: NDArray[np.uint8] | None = None
        self.end = _Mark()
        device.later(self._do)

    def _do(self) -> None:
        self._found = self._read()
        self.end.pass_now()

    @override
    def wait(self) -> NDArray[np.uint8]:
        while self._found is None:
            self._device.do_next()
        return self._found


class LateDevice(HostDevice):
    """See the module.

    Attributes:
        most: Copies to the host that were under way at once.
    """

    def __init__(self) -> None:
        super().__init__(NumpyKernels)
        self._queue: deque[Work] = deque()
        self.most = 0

    def later(self, work: Work) -> None:
        """Enqueue something."""
        self._queue.append(work)
        copies = sum(getattr(work, "__func__", None) is _Copy._do for work in self._queue)
        self.most = max(self.most, copies)

    def taken_most(self) -> int:
        """`most` since this was last asked."""
        most, self.most = self.most, 0
        return most

    def do_next(self) -> None:
        """Do what was enqueued first."""
        self._queue.popleft()()

    @override
    def upload(self, address: int, values: NDArray[Any]) -> None:
        kept, upload = values.copy(), super().upload
        self.later(lambda: upload(address, kept))

    @override
    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[T]) -> NDArray[T]:
        while self._queue:
            self.do_next()
        return super().download(address, shape, dtype)

    @override
    def fetch(self, address: int, size: int) -> Arriving:
        read = super().download
        return _Copy(self, lambda: read(address, (size,), np.dtype(np.uint8)))

    @override
    def mark(self) -> Mark:
        made = _Mark()
        self.later(made.pass_now)
        return made

    @override
    def copy(self, source: int, target: int, size: int) -> None:
        copy = super().copy
        self.later(lambda: copy(source, target, size))

    @override
    def segment(self, file: Path) -> Segment:
        return _Segment(super().segment(file), self.later)

    @override
    def kernels(self, config: Config, files: Mapping[str, Path]) -> Loaded:
        loaded = super().kernels(config, files)
        return Loaded(_Kernels(loaded.kernels, self.later), loaded.sizes, loaded.machine)

    @override
    def activations(self, name: str, files: Mapping[str, Path]) -> gated.Kernels:
        return _Gates(super().activations(name, files), self.later)

    @override
    def choosers(self, files: Mapping[str, Path]) -> choice.Kernels | None:
        inner = super().choosers(files)
        return None if inner is None else _Choosers(inner, self.later)

    @override
    def meeting_place(self, ranks: Communicator, files: Mapping[str, Path]) -> MeetingPlace:
        return _Meetings(super().meeting_place(ranks, files), self.later)


@dataclass(frozen=True, slots=True)
class _Backend(HostBackend):
    @override
    def device(self, number: int = 0) -> LateDevice:
        return LateDevice()


@contextmanager
def late_cuda_on_cpu() -> Iterator[None]:
    """As `cuda_on_cpu`, late."""
    real, cuda.BACKEND = cuda.BACKEND, _Backend()
    child, processes.CHILD = processes.CHILD, "late_rank"
    try:
        yield
    finally:
        cuda.BACKEND, processes.CHILD = real, child
