"""Meetings of GPUs by NCCL, through NVIDIA's bindings (nccl4py)."""

from __future__ import annotations

import importlib
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver
from typing_extensions import override

from vlmforge import lifetime
from vlmforge.backends import Communicator
from vlmforge.backends.cuda.device import ITEM_BYTES, Tensor, Work
from vlmforge.backends.cuda.gpu import Gpu, enter
from vlmforge.backends.ranks import exchange, hindrance
from vlmforge.errors import EngineError
from vlmforge_plugins.cached_attention.driver import call

_ID_BYTES = 128  # NCCL_UNIQUE_ID_BYTES
_BEGIN_S = 120.0
_BETWEEN_S = 1.0  # for a call of another thread to return, before what it uses goes
_LEAVES_S = 5.0


class Nccl:
    """See the module. `made` is how it is made."""

    def __init__(self, gpu: Gpu, bindings: Any, communicator: Any) -> None:
        self._gpu, self._nccl, self._communicator = gpu, bindings, communicator
        self._types = {
            "float16": int(bindings.DataType.Float16),
            "bfloat16": int(bindings.DataType.Bfloat16),
            "float32": int(bindings.DataType.Float32),
        }
        self._rank = int(bindings.comm_user_rank(communicator))
        self._using, self._over = threading.Lock(), threading.Event()
        # Graphs keep what they were captured from, and so this: they are destroyed before.
        end = (gpu.ordinal, bindings, communicator, self._using, self._over)
        weakref.finalize(self, _end, *end).atexit = False
        self._end = end

    @staticmethod
    def made(gpu: Gpu, ranks: Communicator) -> Nccl | str:
        """On all ranks, or on none: why not."""
        bindings: Any = None
        reason = ""
        try:
            bindings = importlib.import_module("nccl.bindings.nccl")  # an extra
            bindings.get_version()  # loads the library
        except (ImportError, RuntimeError, OSError) as error:
            reason = _first_line(error)
        if reason := hindrance(ranks, reason):
            return reason
        key = bytes(bindings.get_unique_id()) if ranks.rank == 0 else bytes(_ID_BYTES)
        key = exchange(ranks, key)[0]
        begun = _Begun(gpu, bindings, ranks, key)
        if reason := hindrance(ranks, begun.wait(ranks)):
            return reason
        return Nccl(gpu, bindings, begun.communicator)

    def give_up(self) -> None:
        """Its kernels wait for nobody any more. By any thread."""
        _end(*self._end)

    def all_reduce(self, given: Tensor, out: Tensor) -> Work:
        """The sum of all ranks' `given`, in NCCL's order."""
        items, kind = math.prod(given.shape), self._types[given.dtype]
        total = int(self._nccl.RedOp.Sum)
        return self._work("all_reduce", given.address, out.address, items, kind, total)

    def broadcast(self, given: int, out: int, count: int) -> Work:
        """`count` int64 of the first rank's, on all."""
        kind = int(self._nccl.DataType.Int64)
        return self._work("broadcast", given, out, count, kind, 0)

    def _work(self, name: str, *arguments: int) -> Work:
        def work() -> None:
            with self._using:
                if self._over.is_set():
                    raise _gone()
                call = getattr(self._nccl, name)
                try:
                    call(*arguments, self._communicator, self._gpu.stream)
                except self._nccl.NCCLError as error:
                    raise _failed(error) from error

        return work

    def all_gather(self, given: Tensor, out: Tensor) -> Work:
        """As `Peers.all_gather`: each adds its columns to zeros, which NCCL can do in place."""
        *rows, width = given.shape
        item, kept = ITEM_BYTES[given.dtype], out.shape[-1]
        begin = min(self._rank * width, kept)
        copy = driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch = given.address, width * item
        copy.dstDevice, copy.dstPitch = out.address + begin * item, kept * item
        copy.WidthInBytes, copy.Height = min(width, kept - begin) * item, math.prod(rows)
        size = math.prod(out.shape) * item
        add = self.all_reduce(out, out)

        def work() -> None:
            call(driver.cuMemsetD8Async, out.address, 0, size, self._gpu.stream)
            if copy.WidthInBytes:
                call(driver.cuMemcpy2DAsync, copy, self._gpu.stream)
            add()

        return work


class _Begun:
    """A communicator that a thread makes: as long as one of the ranks is missing, it waits."""

    def __init__(self, gpu: Gpu, bindings: Any, ranks: Communicator, key: bytes) -> None:
        self.communicator: Any = None
        self._reason = "it does not begin"

        def begin() -> None:
            gpu.enter()
            try:
                one = bytearray(key)
                self.communicator = bindings.comm_init_rank_scalable(
                    ranks.size, ranks.rank, 1, one, 0
                )
                self._reason = ""
            except bindings.NCCLError as error:
                self._reason = _first_line(error)

        self._thread = threading.Thread(target=begin, daemon=True)
        self._thread.start()

    def wait(self, ranks: Communicator) -> str:
        """Why there is none, or "" (RankError: a rank was lost meanwhile)."""
        end = time.monotonic() + _BEGIN_S
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(0.1)
            ranks.check()
        return self._reason


def _end(ordinal: int, bindings: Any, communicator: Any, using: Any, over: threading.Event) -> None:
    """Have NCCL leave, whatever it is doing. Nobody waits: it waits for graphs, and for ever."""
    if over.is_set():
        return
    over.set()

    def abort() -> None:
        mine = using.acquire(timeout=_BETWEEN_S)
        try:
            enter(ordinal)
            bindings.comm_abort(communicator)
        finally:
            if mine:
                using.release()

    _Leaving(abort)


class _Leaving(lifetime.Owner):
    """A thread in which NCCL leaves. At its end the process waits for it, but not for ever."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        # By a method: the thread holds what the process is to wait for.
        self._thread = threading.Thread(target=self._leave, daemon=True)
        self._thread.start()
        lifetime.watch(self)

    def _leave(self) -> None:
        self._abort()

    @override
    def end(self) -> None:
        self._thread.join(_LEAVES_S)

    @override
    def abandon(self) -> None:
        """Nothing: it was not begun here."""


def _gone() -> EngineError:
    return EngineError(
        "The GPUs of the engine do not meet any more.",
        found="a rank that was lost, or a pipeline that is closed",
        expected="ranks that run for as long as their pipeline does",
        fix="make the pipeline again",
    )


def _failed(error: Exception) -> EngineError:
    return EngineError(
        "NCCL failed, by which the engine's GPUs meet.",
        found=_first_line(error),
        expected="a meeting of all ranks",
        fix="NCCL_DEBUG=WARN in the environment has it say more",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
