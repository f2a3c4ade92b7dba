"""Meetings of the GPUs of one host by our own kernels, through memory that all of them see.

Each rank has lanes in its GPU's memory, which the others open by CUDA's handles for other processes
and write into (see `vlmforge_plugins.collectives`).
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from cuda.bindings import driver

from vlmforge.backends import Communicator
from vlmforge.backends.cuda.device import SumAndNorm, Tensor, Work
from vlmforge.backends.cuda.gpu import Gpu, PinnedMemory, free
from vlmforge.backends.ranks import exchange, hindrance
from vlmforge.errors import EngineError
from vlmforge_plugins.cached_attention.config import PTX_TARGETS, TARGETS, Target
from vlmforge_plugins.cached_attention.driver import call, capability
from vlmforge_plugins.cached_attention.kernel_store import newest_target
from vlmforge_plugins.collectives import launcher
from vlmforge_plugins.collectives.driver import CudaKernels
from vlmforge_plugins.errors import PluginError

PATIENCE_S = 30
"""A kernel waits no longer for another rank. That one is lost is noticed otherwise, and sooner."""
_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_PIECE = 2 << 20  # what handles are of
_STOP, _FAILED = 0, 64  # bytes of the host's memory
_TRIED = 1000  # numbers of the first meeting


class Peers:
    """See the module. `made` is how it is made.

    Attributes:
        kernels: Those that it launches.
    """

    def __init__(self, gpu: Gpu, rank: int, size: int, kernels: launcher.Kernels) -> None:
        self._gpu, self.kernels, self._rank = gpu, kernels, rank
        lanes = launcher.lanes_bytes(size)
        needed = -(-(lanes + launcher.COUNTS_BYTES) // _PIECE) * _PIECE
        self._memory = gpu.allocate(needed)
        call(driver.cuMemsetD8Async, self._memory.address, 0, needed, gpu.stream)
        gpu.wait()
        self._counts = self._memory.address + lanes
        self._words = PinnedMemory(2 * _FAILED, gpu.ordinal)
        self._words.bytes[:] = 0
        self._lanes: tuple[int, ...] = ()

    @staticmethod
    def made(gpu: Gpu, ranks: Communicator, files: Mapping[str, Path]) -> Peers | str:
        """On all ranks, or on none: why not."""
        peers, handle, reason = None, bytes(_HANDLE_BYTES), ""
        gpu.enter()
        try:
            peers = Peers(gpu, ranks.rank, ranks.size, _kernels(gpu, files))
            handle = peers.handle()
        except (PluginError, EngineError, OSError) as error:
            reason = _words(error)
        if reason := hindrance(ranks, reason):
            return reason
        assert peers is not None
        handles = exchange(ranks, handle)
        try:
            peers.open(handles)
        except PluginError as error:
            reason = _words(error)
        reason = hindrance(ranks, reason) or hindrance(ranks, peers.tried(ranks.size))
        return reason or peers

    def handle(self) -> bytes:
        """By which other processes open its lanes."""
        found = call(driver.cuIpcGetMemHandle, self._memory.address)
        return ctypes.string_at(found.getPtr(), _HANDLE_BYTES)

    def open(self, handles: Sequence[bytes]) -> None:
        """Those of all ranks."""
        lanes = []
        for rank, data in enumerate(handles):
            if rank == self._rank:
                lanes.append(self._memory.address)
                continue
            handle = driver.CUipcMemHandle()
            ctypes.memmove(handle.getPtr(), data, _HANDLE_BYTES)
            flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            opened = call(driver.cuIpcOpenMemHandle, handle, flags.value)
            lanes.append(int(opened))
            close = driver.cuIpcCloseMemHandle
            weakref.finalize(self, free, self._gpu.ordinal, close, opened).atexit = False
        self._lanes = tuple(lanes)

    def tried(self, size: int) -> str:
        """The first meeting: why it did not give what it should, or ""."""
        ramp = np.arange(_TRIED, dtype=np.float32)
        memory = self._gpu.allocate(ramp.nbytes)
        here = Tensor("tried", "float32", (_TRIED,), memory.address)
        try:
            self._gpu.upload(memory.address, ramp + self._rank)
            self.all_reduce(here, here)()
            found = self._gpu.download(memory.address, (_TRIED,), np.dtype(np.float32))
        except PluginError as error:
            return _words(error)
        expected = size * ramp + size * (size - 1) // 2
        return "" if np.array_equal(found, expected) else "what is written there does not arrive"

    @property
    def failed(self) -> bool:
        """Whether a kernel has waited in vain."""
        return bool(self._words.bytes[_FAILED])

    def give_up(self) -> None:
        """Kernels wait for nobody any more. By any thread."""
        self._words.bytes[_STOP] = 1

    def all_reduce(self, given: Tensor, out: Tensor) -> Work:
        """The sum of all ranks' `given`."""
        items = math.prod(given.shape)
        return self._work(launcher.Sum(given.address, out.address, items, given.dtype))

    def sum_and_norm(self, call: SumAndNorm) -> Work | None:
        """See `MeetingPlace.bind_norm`; None: rows are too long for that."""
        made = normed(call, launcher.SumNorm)
        return self._work(made) if launcher.fits(made) else None

    def all_gather(self, given: Tensor, out: Tensor) -> Work:
        """All ranks' `given` side by side along the last axis, as much as `out` is wide."""
        *rows, width = given.shape
        return self._work(
            launcher.Gather(
                given.address, out.address, math.prod(rows), width, out.shape[-1], given.dtype
            )
        )

    def broadcast(self, given: int, out: int, count: int) -> Work:
        """`count` int64 of the first rank's, on all: of a gather so much that there is one share.

        Halves of them pass for float32: their bits are moved, whatever they are.
        """
        halves = 2 * count
        return self._work(launcher.Gather(given, out, 1, halves, halves, "float32"))

    def _work(self, meeting: launcher.Sum | launcher.Gather | launcher.SumNorm) -> Work:
        words = self._words.address
        place = launcher.Place(
            self._rank,
            self._lanes,
            self._counts,
            words + _STOP,
            words + _FAILED,
            PATIENCE_S * 10**9,
        )
        launches = launcher.launches(meeting, place)

        def work() -> None:
            launcher.run(launches, self.kernels, self._gpu.stream)

        return work


def normed(call: SumAndNorm, kind: type[launcher.N]) -> launcher.N:
    """The launch's description of it."""
    *rows, width = call.given.shape
    return kind(
        call.given.address,
        call.added.address,
        call.scale,
        call.total.address,
        call.normed.address,
        math.prod(rows),
        width,
        call.epsilon,
        call.given.dtype,
    )


def norm_alone(gpu: Gpu, call: SumAndNorm, kernels: launcher.Kernels) -> Work:
    """As `call` where what is given is the sum already."""
    launches = launcher.norm_launches(normed(call, launcher.Norm))

    def work() -> None:
        launcher.run(launches, kernels, gpu.stream)

    return work


def load_kernels(gpu: Gpu, files: Mapping[str, Path]) -> launcher.Kernels:
    """Those of the engine (PluginError: it has none for this GPU)."""
    return _kernels(gpu, files)


def _target(gpu: Gpu, files: Mapping[str, Path]) -> Target:
    """What its kernels for this GPU are compiled for."""
    known = [t for t in (*TARGETS, PTX_TARGETS[False]) if t.name in files]
    target = newest_target(known, capability(gpu.ordinal))
    if target is None:
        raise PluginError("the engine has no kernels in which such GPUs meet")
    return target


def _kernels(gpu: Gpu, files: Mapping[str, Path]) -> CudaKernels:
    return CudaKernels(files[_target(gpu, files).name].read_bytes())


def _words(error: Exception) -> str:
    found = getattr(error, "found", "")
    return f"{str(error).splitlines()[0]}{f' ({found})' if found else ''}"
