"""An NVIDIA GPU as a `Device`: memory, a stream and graphs of the CUDA driver.

Set up as it was measured to work: segments and kernels on one stream of ours, which is given to
ONNX Runtime as `user_compute_stream`; everything bound by address; a step captured in the mode
"thread local" after it has run once.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends import Communicator
from vlmforge.backends.cuda.device import Arriving, Device, Mark, MeetingPlace, Memory, T, Work
from vlmforge.backends.cuda.machine import MEND, PROVIDER
from vlmforge.backends.cuda.own_kernels import load_kernels
from vlmforge.backends.cuda.segments import OrtSegment, open_session
from vlmforge.errors import BackendUnavailableError, EngineError
from vlmforge.ort import ort
from vlmforge_plugins.cached_attention.config import Config, sizes
from vlmforge_plugins.cached_attention.driver import CudaKernels, call, capability, machine
from vlmforge_plugins.cached_attention.kernel_store import Loaded, choose_target
from vlmforge_plugins.cached_attention.plan import Machine
from vlmforge_plugins.errors import PluginError, UnsupportedError
from vlmforge_plugins.gated_activation import launcher as gated
from vlmforge_plugins.token_choice import launcher as choice

_LEAST_STAGING, _MOST_STAGING, _LEAST_FETCH = 1 << 20, 1 << 24, 1 << 14
_UPLOADS = 10  # under way at once: two steps have five each
READERS = 0
"""Threads by which each session's own loader of weights reads them; 0: it has no such loader.

The library's default is 4, and a loader pins two pieces of 64 MiB of the host's memory, which it
keeps: right for one large graph, not for the dozens of a chain.
Source: https://github.com/microsoft/onnxruntime/pull/32437
"""


@cache
def context(ordinal: int = 0) -> Any:
    """The GPU's primary context, which the libraries use too; kept while the process lives."""
    call(driver.cuInit, 0)
    return call(driver.cuDevicePrimaryCtxRetain, call(driver.cuDeviceGet, ordinal))


def enter(ordinal: int = 0) -> None:
    """Make the GPU's context that of the calling thread."""
    call(driver.cuCtxSetCurrent, context(ordinal))


@contextmanager
def visited(ordinal: int) -> Iterator[None]:
    """The GPU's context is that of the calling thread. It goes then, if nobody else uses it.

    That of the first GPU stays: it is the usual one.
    """
    if ordinal == 0:
        enter()
        yield
        return
    call(driver.cuInit, 0)
    number = call(driver.cuDeviceGet, ordinal)
    call(driver.cuCtxSetCurrent, call(driver.cuDevicePrimaryCtxRetain, number))
    try:
        yield
    finally:
        call(driver.cuCtxSetCurrent, 0)
        call(driver.cuDevicePrimaryCtxRelease, number)


class GpuMemory:
    """See `Memory`."""

    def __init__(self, size: int, ordinal: int) -> None:
        try:
            self.address = int(call(driver.cuMemAlloc, size))
        except PluginError as error:
            left, _ = call(driver.cuMemGetInfo)
            raise EngineError(
                "The GPU has no memory left for the engine.",
                found=f"{int(left) / 1e9:.2f} GB free ({error.found})",
                expected=f"{size / 1e9:.2f} GB in one piece",
                fix="EngineConfig(cache_max_entry_count=...) with a smaller share, a smaller "
                "session_len or max_batch_size, or end what else is on the GPU",
            ) from error
        weakref.finalize(self, free, ordinal, driver.cuMemFree, self.address).atexit = False


class PinnedMemory:
    """Memory of the host that the GPU reads and writes at full rate, at the same address."""

    def __init__(self, size: int, ordinal: int) -> None:
        self.address = int(call(driver.cuMemHostAlloc, size, 0))
        raw = (ctypes.c_ubyte * size).from_address(self.address)
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(raw)
        weakref.finalize(self, free, ordinal, driver.cuMemFreeHost, self.address).atexit = False


def free(ordinal: int, function: Any, handle: Any) -> None:
    """Give back what is a GPU's."""
    enter(ordinal)
    call(function, handle)


class Event(Mark):
    """See `Mark`. Also when staging memory may be used again."""

    def __init__(self, stream: int, ordinal: int) -> None:
        self.handle = call(driver.cuEventCreate, 0)
        call(driver.cuEventRecord, self.handle, stream)
        destroy = driver.cuEventDestroy
        weakref.finalize(self, free, ordinal, destroy, self.handle).atexit = False

    def wait(self) -> None:
        """Until the moment has passed."""
        call(driver.cuEventSynchronize, self.handle)

    @override
    def since(self, earlier: Mark) -> float:
        assert isinstance(earlier, Event)
        return float(call(driver.cuEventElapsedTime, earlier.handle, self.handle)) / 1e3


class _Up:
    """Memory from which something is uploaded, and when it has been."""

    def __init__(self, ordinal: int) -> None:
        self._ordinal, self._staging = ordinal, PinnedMemory(_LEAST_STAGING, ordinal)
        self._read: Event | None = None

    def send(self, address: int, values: NDArray[np.uint8], stream: int) -> None:
        if self._read is not None:
            self._read.wait()
        if values.nbytes > len(self._staging.bytes):
            size = 1 << (values.nbytes - 1).bit_length()  # rarely made larger: that takes long
            self._staging = PinnedMemory(size, self._ordinal)
        self._staging.bytes[: values.nbytes] = values
        call(driver.cuMemcpyHtoDAsync, address, self._staging.address, values.nbytes, stream)
        self._read = Event(stream, self._ordinal)


class _Down(Arriving):
    """See `Arriving`. Its staging memory goes back to `kept`."""

    def __init__(self, address: int, size: int, gpu: Gpu, kept: list[PinnedMemory]) -> None:
        self._size, self._gpu, self._kept = size, gpu, kept
        fits = next((s for s in kept if len(s.bytes) >= size), None)
        if fits is not None:
            kept.remove(fits)
        self._staging = fits or PinnedMemory(max(size, _LEAST_FETCH), gpu.ordinal)
        if size:
            call(driver.cuMemcpyDtoHAsync, self._staging.address, address, size, gpu.stream)
        self.end = Event(gpu.stream, gpu.ordinal)

    @override
    def wait(self) -> NDArray[np.uint8]:
        self._gpu.enter()
        try:
            self.end.wait()
        finally:
            self._gpu.waited()
        found = self._staging.bytes[: self._size].copy()
        self._kept.append(self._staging)
        return found


def _nothing() -> None:
    pass


class Gpu(Device):
    """See `Device`. The one with the number `ordinal`.

    Attributes:
        waited: Called whenever it was waited for; raises what has come to light meanwhile.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinal, self.waited = ordinal, _nothing
        self.enter()
        ort.set_default_logger_severity(3)  # it warns of each session that there is no plugin
        non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = call(driver.cuStreamCreate, non_blocking)
        self.stream = int(stream)
        self._ups = itertools.cycle([_Up(ordinal) for _ in range(_UPLOADS)])
        self._down, self._fetched = PinnedMemory(_LEAST_STAGING, ordinal), list[PinnedMemory]()
        weakref.finalize(self, free, ordinal, driver.cuStreamDestroy, stream).atexit = False

    def enter(self) -> None:
        """Make its context that of the calling thread."""
        enter(self.ordinal)

    def wait(self) -> None:
        """Return when all that is enqueued has ended; see `waited` for what it raises."""
        try:
            call(driver.cuStreamSynchronize, self.stream)
        finally:
            self.waited()

    @override
    def allocate(self, size: int) -> GpuMemory:
        self.enter()
        return GpuMemory(size, self.ordinal)

    @override
    def upload(self, address: int, values: NDArray[Any]) -> None:
        self.enter()
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        for start in range(0, len(flat), _MOST_STAGING):
            piece = flat[start : start + _MOST_STAGING]
            next(self._ups).send(address + start, piece, self.stream)
        self.waited()  # for what a step gives, a rank that follows never waits

    @override
    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[T]) -> NDArray[T]:
        self.enter()
        size = dtype.itemsize * math.prod(shape)
        if size > len(self._down.bytes):
            self._down = PinnedMemory(size, self.ordinal)
        call(driver.cuMemcpyDtoHAsync, self._down.address, address, size, self.stream)
        self.wait()
        found: NDArray[T] = self._down.bytes[:size].view(dtype)
        return found.reshape(shape)

    @override
    def fetch(self, address: int, size: int) -> Arriving:
        self.enter()
        return _Down(address, size, self, self._fetched)

    @override
    def mark(self) -> Mark:
        self.enter()
        return Event(self.stream, self.ordinal)

    @override
    def copy(self, source: int, target: int, size: int) -> None:
        self.enter()
        call(driver.cuMemcpyDtoDAsync, target, source, size, self.stream)

    @override
    def weights(self, file: Path, places: Sequence[tuple[int, int]]) -> Sequence[Memory]:
        from vlmforge.backends.cuda.gpu_weights import read_weights

        self.enter()
        return read_weights(self, file, places)

    @override
    def segment(self, file: Path) -> OrtSegment:
        settings = {"user_compute_stream": str(self.stream), "do_copy_in_default_stream": "1"}
        return OrtSegment(_session(file, self.ordinal, settings), "cuda", self, self.ordinal)

    @override
    def session(self, file: Path) -> ort.InferenceSession:
        return _session(file, self.ordinal, {})

    @override
    def kernels(self, config: Config, files: Mapping[str, Path]) -> Loaded:
        self.enter()
        try:
            found = capability(self.ordinal), machine(self.ordinal)
            return _loaded(config, files, *found)
        except PluginError as error:
            raise BackendUnavailableError(
                error.summary, found=error.found, expected=error.expected, fix=error.fix
            ) from error

    @override
    def activations(self, name: str, files: Mapping[str, Path]) -> gated.Kernels:
        from vlmforge_plugins.gated_activation.driver import CudaKernels as Gates

        self.enter()
        found = capability(self.ordinal)
        return load_kernels(
            "gated activations", files, found, lambda code, target: Gates(code, target, name)
        )

    @override
    def choosers(self, files: Mapping[str, Path]) -> choice.Kernels | None:
        from vlmforge_plugins.token_choice.driver import CudaKernels as Choosers

        self.enter()
        return load_kernels("choosing tokens", files, capability(self.ordinal), Choosers)

    @override
    def meeting_place(self, ranks: Communicator, files: Mapping[str, Path]) -> MeetingPlace:
        from vlmforge.backends.cuda.meeting import meet_first  # of several ranks only

        return meet_first(self, ranks, files)

    @override
    def captured(self, work: Work) -> Work:
        self.enter()
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(driver.cuStreamBeginCapture, self.stream, mode)
        try:
            work()
        finally:
            graph = call(driver.cuStreamEndCapture, self.stream)
        return _Replay(graph, self.stream, work, self.ordinal)


def _session(file: Path, ordinal: int, settings: Mapping[str, str]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # nothing runs on the host; a chain has many sessions
    options.enable_mem_pattern = False  # it keeps one piece of memory for each size that ever came
    common = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    # To try all ways to convolve takes long for each number of views, and memory that is not given
    # back; what is convolved is an image's patches, once.
    common |= {"device_id": str(ordinal), "cudnn_conv_algo_search": "HEURISTIC"}
    common["external_data_loader_reading_threads"] = str(READERS)
    session = open_session(file, [(PROVIDER, {**common, **settings})], options)
    if session.get_providers()[0] != PROVIDER:
        raise not_loaded(file)
    return session


class _Replay:
    """A captured graph. What it was captured from, and all that is in it, is kept."""

    def __init__(self, graph: Any, stream: int, work: Work, ordinal: int) -> None:
        self._ready = call(driver.cuGraphInstantiate, graph, 0)
        call(driver.cuGraphDestroy, graph)
        self._stream, self._work = stream, work
        weakref.finalize(self, free, ordinal, driver.cuGraphExecDestroy, self._ready).atexit = False

    def __call__(self) -> None:
        call(driver.cuGraphLaunch, self._ready, self._stream)


def _loaded(config: Config, files: Mapping[str, Path], is_there: int, gpu: Machine) -> Loaded:
    target = choose_target(config, files.keys(), is_there)
    chosen = sizes(config, target)
    try:
        code = files[target.name].read_bytes()
    except OSError as error:
        raise UnsupportedError(
            f"The kernels {files[target.name]} cannot be read.", found=str(error.strerror)
        ) from error
    return Loaded(CudaKernels(code, chosen), chosen, gpu)


def not_loaded(file: Path) -> BackendUnavailableError:
    """ONNX Runtime took its CPU provider in place of the GPU's."""
    return BackendUnavailableError(
        "ONNX Runtime cannot load its CUDA provider here.",
        found=f"{file.name} would run on the processor",
        expected="the libraries of CUDA 13 (cublas, cudart, curand, cufft) where they are found",
        fix=f"pip install 'vlmforge[cuda]'; {MEND}",
    )
