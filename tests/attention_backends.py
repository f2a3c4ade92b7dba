"""Where the attention kernels of a test run: compiled for the host, or on a GPU.

The host build needs g++. The GPU needs cuda-bindings and a compiler (NVRTC or nvcc).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attention_cases import Batch
from vlmforge_plugins.cached_attention.compile import SOURCES
from vlmforge_plugins.cached_attention.config import TARGETS, Config, Sizes, Target, sizes
from vlmforge_plugins.cached_attention.launcher import (
    MAP_BYTES,
    Boxes,
    Kernels,
    Params,
    Rows,
    Tensors,
    run,
)
from vlmforge_plugins.cached_attention.plan import Launch, Machine, Plan, plan

ROOT = Path(__file__).parents[1]
HOST_SOURCES = ROOT / "tests" / "plugins_cuda" / "host"
# -Og is compiled in a third of the time; what runs long asks for more itself.
FLAGS = (
    *("-std=c++17", "-Og", "-march=native", "-fPIC"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
)
POISON = 0xFF
LOOKED_AT = 1 << 15  # elements
Arrays = dict[str, NDArray[Any]]


class Backend(Protocol):
    """Runs a batch and returns the arrays as the kernels left them."""

    def run(self, batch: Batch) -> Arrays: ...


def addresses(batch: Batch, at: Callable[[str], int], scratch: int) -> Tensors:
    """The kernels' view of a batch whose arrays lie at `at(name)`."""

    def rows(name: str) -> Rows:
        packed = name in batch.offsets
        start = at("packed") + batch.offsets[name] if packed else at(name)
        return Rows(start, *batch.strides[name])

    return Tensors(
        query=rows("query"),
        key=rows("key"),
        value=rows("value"),
        out=rows("out"),
        key_pool=at("key_pool"),
        value_pool=at("value_pool"),
        pages=len(batch.arrays["key_pool"]),
        cos=at("cos") if batch.case.rotary else 0,
        sin=at("sin") if batch.case.rotary else 0,
        past_lengths=at("past_lengths"),
        query_lengths=at("query_lengths"),
        block_table=at("block_table"),
        workspace=scratch,
    )


@cache
def host_library(chosen: Sizes, sources: Path = SOURCES) -> ctypes.CDLL:
    """The kernels' sources compiled by g++; kept by the content of all that goes in."""
    files = [
        p for folder in (sources, HOST_SOURCES) for p in sorted(folder.iterdir()) if p.is_file()
    ]
    defines = [f"-D{define}" for define in chosen.defines]
    header = _standard_library()
    places = (f"-I{folder}" for folder in (sources, HOST_SOURCES, header.parent))
    options = ["-shared", *defines, *places, "-include", header.name]
    main, name = HOST_SOURCES / "kernels.cpp", f"{chosen.config.name}-"
    return ctypes.CDLL(str(_compiled(main, files, options, name, ".so")))


def host_build(main: Path, folders: Sequence[Path], *flags: str) -> Path:
    """What g++ makes of `main`, whose headers lie in `folders` and beside the other kernels."""
    places = (*folders, HOST_SOURCES)
    files = [path for folder in places for path in sorted(folder.iterdir()) if path.is_file()]
    header = _standard_library()
    includes = (f"-I{folder}" for folder in (*places, header.parent))
    options = ["-shared", *flags, *includes, "-include", header.name]
    return _compiled(main, files, options, f"{main.stem}-", ".so")


@cache
def _standard_library() -> Path:
    """A header that lies beside itself compiled: reading it takes a third of a library's time."""
    header = HOST_SOURCES / "standard_library.h"
    compiled = _compiled(header, [header], ["-x", "c++-header"], "", ".h.gch")
    beside = compiled.with_suffix("")
    beside.write_bytes(header.read_bytes())
    return beside


def _compiled(
    source: Path, files: Sequence[Path], options: Sequence[str], name: str, suffix: str
) -> Path:
    """What g++ makes of `source`; kept by `options`, but for places, and the content of `files`."""
    state = hashlib.sha256("".join(_processor()).encode())
    state.update(" ".join(o for o in (*FLAGS, *options) if not o.startswith("-I")).encode())
    for path in files:
        state.update(path.read_bytes())
    made = ROOT / "out" / "host_kernels" / f"{name}{state.hexdigest()[:24]}{suffix}"
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        # Two threads may want it at once, and so may two processes: the last one's is kept.
        beside = made.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        subprocess.run(["g++", *FLAGS, *options, str(source), "-o", str(beside)], check=True)
        beside.rename(made)
    return made


@cache
def _processor() -> tuple[str, ...]:
    """What is compiled for: not its speed at the moment, which stands there too."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    told = (line for line in lines if line.startswith(("model name", "flags", "Features")))
    return tuple(sorted(set(told)))


class HostKernels:
    """The host build behind the interface of `CudaKernels`.

    A kernel that overlaps with the one in front is run as if all of it began first: until a thread
    waits, it finds `pools` and `results` as they were before that one, and what it writes is lost.
    """

    def __init__(self, chosen: Sizes, direction: int = 1, sources: Path = SOURCES) -> None:
        self._library = host_library(chosen, sources)
        self._direction = direction
        self.pools: list[NDArray[Any]] = []  # written by vf_write alone
        self.results: list[NDArray[Any]] = []  # written by any kernel
        self._before: list[bytes] = []

    def tile_map(self, boxes: Boxes) -> bytes:
        """`HostMap` of host_hopper.h."""
        numbers = (boxes.address, boxes.rows, boxes.columns, boxes.box_rows)
        return struct.pack("4q", *numbers).ljust(MAP_BYTES, b"\0")

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        """Runs one kernel to its end; the stream is the order of calls."""
        arrays = [*((a, True) for a in self.pools), *((a, False) for a in self.results)]
        before, self._before = self._before, [array.tobytes() for array, _ in arrays]
        if launch.overlaps and before:
            for (array, only_read), was in zip(arrays, before, strict=True):
                self._late(array.ctypes.data, was, array.nbytes, only_read)
        status = self._library.vf_launch(
            launch.kernel.encode(),
            ctypes.byref(params),
            *launch.grid,
            launch.threads,
            launch.shared_bytes,
            self._direction,
        )
        self._late(None, None, 0, False)
        problem = {
            1: "a block wrote behind its shared memory",
            2: "a thread did not wait for the kernel in front",
        }
        assert status == 0, f"{launch.kernel}: {problem[status]}"

    def _late(self, at: int | None, before: bytes | None, size: int, only_read: bool) -> None:
        self._library.vf_late(
            ctypes.c_void_p(at), before, ctypes.c_long(size), ctypes.c_bool(only_read)
        )


class HostBackend:
    """Runs cases on the CPU, with the threads of a block in turns by `direction`."""

    machine = Machine(multiprocessors=4, shared_bytes=227 << 10)

    def __init__(self, direction: int = 1) -> None:
        self._direction = direction

    def run(self, batch: Batch) -> Arrays:
        compiled = sizes(batch.case.config, batch.case.target)
        chosen = plan(batch.shape, compiled, self.machine)
        return self.run_plan(batch, chosen, HostKernels(compiled, self._direction))

    def run_plan(self, batch: Batch, chosen: Plan, kernels: HostKernels) -> Arrays:
        arrays = {name: _aligned_copy(array) for name, array in batch.arrays.items()}
        scratch = _aligned_copy(np.full(chosen.workspace.size + 256, POISON, np.uint8))
        kernels.pools = [arrays["key_pool"], arrays["value_pool"]]
        # Of large ones the ends: what is written too early is written too early there as well.
        end = max(LOOKED_AT, len(scratch) - LOOKED_AT)
        flat = arrays["out"].reshape(-1)
        kernels.results = [flat[:LOOKED_AT], scratch[:LOOKED_AT], scratch[end:]]
        tensors = addresses(batch, lambda name: arrays[name].ctypes.data, scratch.ctypes.data)
        run(chosen, tensors, batch.scales, kernels, 0)
        assert (scratch[chosen.workspace.size :] == POISON).all(), "written behind the workspace"
        for name in batch.arrays.keys() - {"key_pool", "value_pool", "out"}:
            assert (arrays[name] == batch.arrays[name]).all(), f"{name} was written"
        return arrays


def _aligned_copy(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that starts at a multiple of 256 bytes, as device memory does."""
    space = np.empty(array.nbytes + 256, np.uint8)
    start = -space.ctypes.data % 256
    copy = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class CudaBackend:
    """Runs cases on the first GPU.

    Args:
        kernels: Makes (and keeps) the loaded kernels of a configuration.
        target: What the GPU is.
    """

    def __init__(
        self, kernels: Callable[[Config], Kernels], machine: Machine, target: Target
    ) -> None:
        self.kernels = kernels
        self.machine = machine
        self.target = target

    def run(self, batch: Batch) -> Arrays:
        chosen = plan(batch.shape, sizes(batch.case.config, self.target), self.machine)
        return self.run_plan(batch, chosen, self.kernels(batch.case.config))

    def run_plan(self, batch: Batch, chosen: Plan, kernels: Kernels) -> Arrays:
        from cuda.bindings import driver

        from vlmforge_plugins.cached_attention.driver import call

        at: dict[str, int] = {}
        poison = np.full(chosen.workspace.size + 256, POISON, np.uint8)
        for name, array in {**batch.arrays, "workspace": poison}.items():
            at[name] = int(call(driver.cuMemAlloc, array.nbytes))
            call(
                driver.cuMemcpyHtoD, at[name], np.ascontiguousarray(array).ctypes.data, array.nbytes
            )
        try:
            run(chosen, addresses(batch, at.__getitem__, at["workspace"]), batch.scales, kernels, 0)
            call(driver.cuCtxSynchronize)
            after = {name: np.empty_like(batch.arrays[name]) for name in batch.arrays}
            for name, array in after.items():
                call(driver.cuMemcpyDtoH, array.ctypes.data, at[name], array.nbytes)
        finally:
            for pointer in at.values():
                call(driver.cuMemFree, pointer)
        return after


def cuda_backend(find: Callable[[Sizes, Target], bytes], plain: bool = False) -> CudaBackend | None:
    """The first GPU, or None if there is none.

    Args:
        find: Gives a cubin.
        plain: Use no instructions that only this very kind of GPU has.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    from vlmforge_plugins.cached_attention.driver import CudaKernels, call, capability, machine

    try:
        (status,) = driver.cuInit(0)
    except RuntimeError:  # the driver's library is not there
        return None
    if status != driver.CUresult.CUDA_SUCCESS:
        return None
    context = call(driver.cuDevicePrimaryCtxRetain, call(driver.cuDeviceGet, 0))
    call(driver.cuCtxSetCurrent, context)
    target = next(t for t in TARGETS if t.capability == capability())
    if plain:
        target = replace(target, arch=target.arch.removesuffix("a"))

    @cache
    def kernels(config: Config) -> Kernels:
        chosen = sizes(config, target)
        return CudaKernels(find(chosen, target), chosen)

    return CudaBackend(kernels, machine(), target)
