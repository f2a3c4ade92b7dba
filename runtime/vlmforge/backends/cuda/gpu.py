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
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends.cuda.device import Arriving, Device, Mark, T, Work
from vlmforge.backends.cuda.machine import MEND, PROVIDER
from vlmforge.backends.cuda.segments import OrtSegment, open_session
from vlmforge.errors import BackendUnavailableError, EngineError
from vlmforge.ort import ort
from vlmforge_plugins.cached_attention.config import Config, sizes
from vlmforge_plugins.cached_attention.driver import CudaKernels, call, capability, machine
from vlmforge_plugins.cached_attention.kernel_store import Loaded, choose_target
from vlmforge_plugins.cached_attention.plan import Machine
from vlmforge_plugins.errors import PluginError, UnsupportedError

_LEAST_STAGING, _LEAST_FETCH = 1 << 20, 1 << 14
_UPLOADS = 4  # under way at once: two steps have two each


@cache
def context(ordinal: int = 0) -> Any:
    """The GPU's primary context, which the libraries use too; kept while the process lives."""
    call(driver.cuInit, 0)
    return call(driver.cuDevicePrimaryCtxRetain, call(driver.cuDeviceGet, ordinal))


def enter(ordinal: int = 0) -> None:
    """Make the GPU's context that of the calling thread."""
    call(driver.cuCtxSetCurrent, context(ordinal))


class GpuMemory:
    """See `Memory`."""

    def __init__(self, size: int) -> None:
        try:
            self.address = int(call(driver.cuMemAlloc, size))
        except PluginError as error:
            free, _ = call(driver.cuMemGetInfo)
            raise EngineError(
                "The GPU has no memory left for the engine.",
                found=f"{int(free) / 1e9:.2f} GB free ({error.found})",
                expected=f"{size / 1e9:.2f} GB in one piece",
                fix="EngineConfig(cache_max_entry_count=...) with a smaller share, a smaller "
                "session_len or max_batch_size, or end what else is on the GPU",
            ) from error
        weakref.finalize(self, _free, driver.cuMemFree, self.address).atexit = False


class _Staging:
    """Memory of the host that the GPU reads and writes at full rate."""

    def __init__(self, size: int) -> None:
        self.address = int(call(driver.cuMemHostAlloc, size, 0))
        raw = (ctypes.c_ubyte * size).from_address(self.address)
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(raw)
        weakref.finalize(self, _free, driver.cuMemFreeHost, self.address).atexit = False


class _Event(Mark):
    """See `Mark`. Also when staging memory may be used again."""

    def __init__(self, stream: int) -> None:
        self.handle = call(driver.cuEventCreate, 0)
        call(driver.cuEventRecord, self.handle, stream)
        weakref.finalize(self, _free, driver.cuEventDestroy, self.handle).atexit = False

    def wait(self) -> None:
        """Until the moment has passed."""
        call(driver.cuEventSynchronize, self.handle)

    @override
    def since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Event)
        return float(call(driver.cuEventElapsedTime, earlier.handle, self.handle)) / 1e3


class _Up:
    """Memory from which something is uploaded, and when it has been."""

    def __init__(self) -> None:
        self._staging = _Staging(_LEAST_STAGING)
        self._read: _Event | None = None

    def send(self, address: int, values: NDArray[Any], stream: int) -> None:
        if self._read is not None:
            self._read.wait()
        if values.nbytes > len(self._staging.bytes):
            self._staging = _Staging(values.nbytes)
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._staging.bytes[: values.nbytes] = flat
        call(driver.cuMemcpyHtoDAsync, address, self._staging.address, values.nbytes, stream)
        self._read = _Event(stream)


class _Down(Arriving):
    """See `Arriving`. Its staging memory goes back to `kept`."""

    def __init__(self, address: int, size: int, stream: int, kept: list[_Staging]) -> None:
        self._size, self._kept = size, kept
        fits = next((s for s in kept if len(s.bytes) >= size), None)
        if fits is not None:
            kept.remove(fits)
        self._staging = fits or _Staging(max(size, _LEAST_FETCH))
        if size:
            call(driver.cuMemcpyDtoHAsync, self._staging.address, address, size, stream)
        self.end = _Event(stream)

    @override
    def wait(self) -> NDArray[np.uint8]:
        enter()
        self.end.wait()
        found = self._staging.bytes[: self._size].copy()
        self._kept.append(self._staging)
        return found


def _free(function: Any, handle: Any) -> None:
    enter()
    call(function, handle)


class Gpu(Device):
    """See `Device`."""

    def __init__(self) -> None:
        enter()
        ort.set_default_logger_severity(3)  # it warns of each session that there is no plugin
        non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = call(driver.cuStreamCreate, non_blocking)
        self.stream = int(stream)
        self._ups = itertools.cycle([_Up() for _ in range(_UPLOADS)])
        self._down, self._fetched = _Staging(_LEAST_STAGING), list[_Staging]()
        weakref.finalize(self, _free, driver.cuStreamDestroy, stream).atexit = False

    @override
    def allocate(self, size: int) -> GpuMemory:
        enter()
        return GpuMemory(size)

    @override
    def upload(self, address: int, values: NDArray[Any]) -> None:
        enter()
        next(self._ups).send(address, values, self.stream)

    @override
    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[T]) -> NDArray[T]:
        enter()
        size = dtype.itemsize * math.prod(shape)
        if size > len(self._down.bytes):
            self._down = _Staging(size)
        call(driver.cuMemcpyDtoHAsync, self._down.address, address, size, self.stream)
        call(driver.cuStreamSynchronize, self.stream)
        found: NDArray[T] = self._down.bytes[:size].view(dtype)
        return found.reshape(shape)

    @override
    def fetch(self, address: int, size: int) -> Arriving:
        enter()
        return _Down(address, size, self.stream, self._fetched)

    @override
    def mark(self) -> Mark:
        enter()
        return _Event(self.stream)

    @override
    def copy(self, source: int, target: int, size: int) -> None:
        enter()
        call(driver.cuMemcpyDtoDAsync, target, source, size, self.stream)

    @override
    def segment(self, file: Path) -> OrtSegment:
        settings = {"user_compute_stream": str(self.stream), "do_copy_in_default_stream": "1"}
        return OrtSegment(_session(file, settings), "cuda", self)

    @override
    def session(self, file: Path) -> ort.InferenceSession:
        return _session(file, {})

    @override
    def kernels(self, config: Config, files: Mapping[str, Path]) -> Loaded:
        enter()
        try:
            return _loaded(config, files, capability(), machine())
        except PluginError as error:
            raise BackendUnavailableError(
                error.summary, found=error.found, expected=error.expected, fix=error.fix
            ) from error

    @override
    def captured(self, work: Work) -> Work:
        enter()
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(driver.cuStreamBeginCapture, self.stream, mode)
        try:
            work()
        finally:
            graph = call(driver.cuStreamEndCapture, self.stream)
        return _Replay(graph, self.stream, work)


def _session(file: Path, settings: Mapping[str, str]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.enable_mem_pattern = False  # it keeps one piece of memory for each size that ever came
    common = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    session = open_session(file, [(PROVIDER, {**common, **settings})], options)
    if session.get_providers()[0] != PROVIDER:
        raise not_loaded(file)
    return session


class _Replay:
    """A captured graph. What it was captured from, and all that is in it, is kept."""

    def __init__(self, graph: Any, stream: int, work: Work) -> None:
        self._ready = call(driver.cuGraphInstantiate, graph, 0)
        call(driver.cuGraphDestroy, graph)
        self._stream, self._work = stream, work
        weakref.finalize(self, _free, driver.cuGraphExecDestroy, self._ready).atexit = False

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
