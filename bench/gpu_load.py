"""Where the time goes from a process's start to an engine on a GPU that answers.

    python3 bench/gpu_load.py ENGINE                          # as pipelines do, and other ways
    python3 bench/gpu_load.py ENGINE --ways 0:1 4:1 --out results.jsonl
    python bench/gpu_load.py ENGINE --on-cpu --ways 0:1       # the stand-in

`load`: a process of its own for each way, `R:N`: sessions whose weights are read by R threads of
the library's loader (0: without it), N of them made at once (runtimes make one after the other).
Where they overlap, `sessions_s` is the time in which any is being made, `sessions_sum_s` that of
all; `rest_s` is what no other column has (the files' check, templates, the tokenizer). `pieces`:
what a session is made of, a handle of a library at a time, and how fast weights come to the device.
All is in the system's cache from the second process on, so the first way is run twice.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import mmap
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("runtime", "plugins_cuda")]

from gpu_results import Results, attempt, attempts, seconds_of  # noqa: E402

SLOTS = 64
_WAYS = ("0:1", "4:1", "0:3", "4:3")
_TIMES = 8
_COPIED, _PINNED = 1 << 30, 1 << 26
# Of CUDA 13: the library that ONNX Runtime has loaded, and what makes a handle of it.
_HANDLES = (
    ("libcublas.so.13", "cublasCreate_v2"),
    ("libcublasLt.so.13", "cublasLtCreate"),
    ("libcudnn.so.9", "cudnnCreate"),
)


class Clock:
    """When what was done, from any thread."""

    def __init__(self) -> None:
        self._lock, self.spans = threading.Lock(), dict[str, list[tuple[float, float]]]()

    def watch(self, owner: Any, function: str, kind: str) -> None:
        """Note each call of `owner.function`."""
        real = getattr(owner, function)

        @functools.wraps(real)
        def noted(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(*given, **named)
            finally:
                with self._lock:
                    self.spans.setdefault(kind, []).append((began, time.perf_counter()))

        setattr(owner, function, noted)

    def took(self, *kinds: str) -> float:
        """Seconds in which anything of these kinds was being done."""
        until = whole = 0.0
        for begin, end in sorted(span for kind in kinds for span in self.spans.get(kind, [])):
            whole += max(0.0, end - max(begin, until))
            until = max(until, end)
        return whole

    def each(self, kind: str) -> list[float]:
        """Seconds of each call, in the order in which they began."""
        return [end - begin for begin, end in sorted(self.spans.get(kind, []))]


def load(engine: Path, way: str, on_cpu: bool, began: float, results: Results) -> None:
    """In a process that began at `began`, by `time.time`."""
    from vlmforge import GenerationConfig, pipeline
    from vlmforge.backends.cuda import machine

    device = _device(on_cpu)
    imported = time.time() - began
    clock = _watched(device)
    _choose(way, device, engine, on_cpu)
    free = 0 if on_cpu else machine.find_gpu().free  # the driver begins here, not in `rest_s`
    driver = time.time() - began - imported
    with _place(on_cpu), pipeline(engine, max_batch_size=SLOTS) as pipe:
        ready, taken = time.time() - began, 0 if on_cpu else free - machine.find_gpu().free
        at_load, kinds = clock.each("captures"), tuple(clock.spans)
        known = clock.took(*kinds)
        sessions = clock.each("sessions")
        row = {
            "ready_s": ready,
            "imports_s": imported,
            "driver_s": driver,
            "libraries_s": clock.took("libraries"),
            "sessions": len(sessions),
            "sessions_s": clock.took("sessions"),
            "sessions_sum_s": sum(sessions),
            "first_session_s": sessions[0],
            "others_ms": 1e3 * statistics.median(sessions[1:]),
            "tower_run_s": clock.took("tower"),
            "chain_runs_s": clock.took("chain"),
            "kernels_s": clock.took("kernels"),
            "memory_s": clock.took("memory"),
            "weights_s": clock.took("weights"),
            "captures_at_load": len(at_load),
            "rest_s": ready - imported - driver - known,
            "host_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            "device_gb": taken / 1e9,
        }
        pipe("hi", GenerationConfig(max_new_tokens=1, ignore_eos=True))
        row["first_answer_s"] = time.time() - began
        pipe("hi", GenerationConfig(max_new_tokens=4, ignore_eos=True))
        row["captures_ms"] = 1e3 * clock.took("captures")
    results.add("load", engine=engine.name, case=way, **row)


def _device(on_cpu: bool) -> Any:
    """The class of devices that are used."""
    if on_cpu:
        from vlmforge.backends.fake import HostDevice

        return HostDevice
    from vlmforge.backends.cuda.gpu import Gpu

    return Gpu


def _choose(way: str, device: Any, engine: Path, on_cpu: bool) -> None:
    """Load as `way` says; with more than one at once, a chain's others ahead, behind its first."""
    from vlmforge.backends.cuda import gpu
    from vlmforge.engine.manifest import load_manifest

    readers, at_once = map(int, way.split(":"))
    if not on_cpu:
        gpu.READERS = readers
    chain = load_manifest(engine).part("decoder").chain
    assert chain is not None
    if at_once == 1:
        return
    first, *others = [engine / segment.file for segment in chain.segments]
    real, pool, ahead = device.segment, ThreadPoolExecutor(at_once), dict[Path, Any]()

    def segment(self: Any, file: Path) -> Any:
        if file in ahead:
            return ahead.pop(file).result()
        loaded = real(self, file)
        if file == first:
            ahead.update({other: pool.submit(real, self, other) for other in others})
        return loaded

    device.segment = segment


def _place(on_cpu: bool) -> contextlib.AbstractContextManager[None]:
    from vlmforge.backends.fake import cuda_on_cpu

    return cuda_on_cpu() if on_cpu else contextlib.nullcontext()


def _watched(device: Any) -> Clock:
    """Parts of loading, none within another."""
    from vlmforge.backends.cuda import machine
    from vlmforge.backends.cuda.decoder import PagedDecoder
    from vlmforge.backends.cuda.vision import DeviceVision

    clock = Clock()
    clock.watch(machine, "preload", "libraries")
    clock.watch(device, "segment", "sessions")
    clock.watch(device, "weights", "weights")
    clock.watch(device, "allocate", "memory")
    for function in ("kernels", "activations", "choosers"):
        clock.watch(device, function, "kernels")
    clock.watch(device, "captured", "captures")
    clock.watch(DeviceVision, "_warm_up", "tower")
    clock.watch(PagedDecoder, "_warm_up", "chain")
    return clock


def pieces(engine: Path, results: Results) -> None:
    """What a session is made of."""
    from vlmforge.backends.cuda import gpu, machine

    machine.preload()
    device, name = gpu.Gpu(), engine.name
    failed = 0
    for library, function in _HANDLES:
        work: Callable[[], object] = partial(_handles, library, function, name, results)
        failed += attempt(function, work)
    failed += attempt("pinned memory", partial(_pinned, device, name, results))
    failed += attempt("small sessions", partial(_small, engine, device, results))
    failed += attempt("weights", partial(_copies, engine, device, results))
    assert not failed, f"{failed} pieces failed"


def _handles(library: str, function: str, name: str, results: Results) -> None:
    """Of a library: seconds of the first, milliseconds of others."""
    from vlmforge.backends.cuda import machine

    create, kept = getattr(ctypes.CDLL(library), function), list[ctypes.c_void_p]()

    def one() -> None:
        kept.append(ctypes.c_void_p())
        assert create(ctypes.byref(kept[-1])) == 0

    first, free = seconds_of(one), machine.find_gpu().free
    others = [seconds_of(one) for _ in range(_TIMES)]
    each = (free - machine.find_gpu().free) / _TIMES
    row = {"first_s": first, "others_ms": 1e3 * statistics.median(others), "each_mb": each / 1e6}
    results.add("handles", engine=name, case=function, **row)


def _pinned(device: Any, name: str, results: Results) -> None:
    """As a loader of weights takes it for each session: two pieces of 64 MiB."""
    from vlmforge.backends.cuda.gpu import PinnedMemory

    kept = list[Any]()

    def one() -> None:
        kept.extend(PinnedMemory(_PINNED, device.ordinal) for _ in range(2))

    first, others = seconds_of(one), [seconds_of(one) for _ in range(_TIMES)]
    row = {"first_s": first, "others_ms": 1e3 * statistics.median(others)}
    results.add("handles", engine=name, case="two of 64 MiB, pinned", **row)


def _small(engine: Path, device: Any, results: Results) -> None:
    """Sessions of the graph that has least to load: what a session takes whatever is in it."""
    from vlmforge.engine.manifest import load_manifest
    from vlmforge.ort import ort

    chain = load_manifest(engine).part("decoder").chain
    assert chain is not None
    file = engine / (chain.sampler or min(chain.segments, key=lambda s: s.matrix_bytes)).file
    options, kept = ort.SessionOptions(), list[Any]()
    options.intra_op_num_threads = 1

    def on_device(_: int = 0) -> None:
        kept.append(device.segment(file))

    def on_host() -> None:
        kept.append(ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]))

    for case, work in (("device", on_device), ("host", on_host)):
        first, others = seconds_of(work), [seconds_of(work) for _ in range(_TIMES)]
        row = {"first_s": first, "others_ms": 1e3 * statistics.median(others)}
        results.add("small sessions", engine=engine.name, case=case, **row)
    for threads in (2, 3, 4, 8):
        with ThreadPoolExecutor(threads) as pool:
            whole = seconds_of(lambda pool=pool: list(pool.map(on_device, range(2 * _TIMES))))
        row = {"others_ms": 1e3 * whole / (2 * _TIMES)}
        results.add("small sessions", engine=engine.name, case=f"device, {threads} at once", **row)


def _copies(engine: Path, device: Any, results: Results) -> None:
    """Weights from the file's mapped pages to the device, a new mapping each time."""
    from cuda.bindings import driver

    from vlmforge.engine.manifest import load_manifest
    from vlmforge_plugins.cached_attention.driver import call

    path = max((engine / f for f in load_manifest(engine).part("decoder").data), key=_size)
    size = min(_COPIED, _size(path))
    memory = device.allocate(size)

    def copy(begin: int, end: int) -> None:
        device.enter()
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
            start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            call(driver.cuMemcpyHtoD, memory.address + begin, start + begin, end - begin)

    copy(0, size)
    for threads in (1, 2, 3, 4, 8):
        step = -(-size // threads)
        bounds = [(begin, min(size, begin + step)) for begin in range(0, size, step)]
        with ThreadPoolExecutor(threads) as pool:
            took = seconds_of(lambda p=pool, b=bounds: list(p.map(lambda one: copy(*one), b)))
        case, rate = f"{threads} at once", size / 1e9 / took
        results.add("weights", engine=engine.name, case=case, gb_s=rate)


def _size(path: Path) -> int:
    return path.stat().st_size


def apart(given: argparse.Namespace, *more: str) -> None:
    """In a process of its own."""
    command = [sys.executable, __file__, str(given.engine), *more, "--began", str(time.time())]
    command += ["--on-cpu"] if given.on_cpu else []
    command += [] if given.out is None else ["--out", str(given.out)]
    assert subprocess.run(command, check=False).returncode == 0, more


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--ways", nargs="+", default=list(_WAYS), metavar="R:N")
    parser.add_argument("--on-cpu", action="store_true", help="the processor in a GPU's place")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results = Results(given.out)
    if given.child == "pieces":
        pieces(given.engine, results)
    elif given.child:
        load(given.engine, given.child, given.on_cpu, given.began, results)
    else:
        ways = [given.ways[0], *given.ways]
        works = [(way, partial(apart, given, "--child", way)) for way in ways]
        if not given.on_cpu:
            works.append(("pieces", partial(apart, given, "--child", "pieces")))
        attempts(works)


if __name__ == "__main__":
    main()
