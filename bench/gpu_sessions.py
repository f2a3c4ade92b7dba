"""What the segments of a chain cost on a GPU: to load, in memory, and each run in the host's time.

    python3 bench/gpu_sessions.py ENGINE

Each way of loading in a process of its own: one after the other, as a pipeline does; with a pool of
threads in each session, as ONNX Runtime has it by itself; several at once. Runs are of one token,
enqueued and not waited for.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("runtime", "plugins_cuda")]

from gpu_results import Results, attempts  # noqa: E402
from vlmforge.backends.cuda import gpu as gpus  # noqa: E402
from vlmforge.backends.cuda import machine  # noqa: E402
from vlmforge.backends.cuda.device import ITEM_BYTES, Tensor  # noqa: E402
from vlmforge.backends.cuda.placed_weights import PlacedWeights, place_weights  # noqa: E402
from vlmforge.engine.chain import Segment, TensorSpec  # noqa: E402
from vlmforge.engine.manifest import load_manifest  # noqa: E402
from vlmforge.ort import ort  # noqa: E402

WAYS = ("in order", "with threads", "4 at once", "8 at once")
_RUNS = 100


class _Threads(ort.SessionOptions):  # type: ignore[misc]
    """A pool in each session, whatever is asked for."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "intra_op_num_threads":
            super().__setattr__(name, value)


def load(engine: Path, way: str, results: Results) -> None:
    """One way; rows of seconds, of the memory beside the weights, and of the runs."""
    machine.preload()
    part = load_manifest(engine).part("decoder")
    assert part.chain is not None
    if way == "with threads":
        ort.SessionOptions = _Threads  # type: ignore[misc]
    segments, device = [kind[0] for kind in part.chain.kinds.values()], gpus.Gpu()
    free = machine.find_gpu().free
    began = time.perf_counter()
    weights = place_weights(device, engine, part.chain)
    device.wait()
    results.add("weights", engine=engine.name, case=way, bound_s=time.perf_counter() - began)
    took: list[float] = []

    def one(segment: Segment) -> Any:
        began = time.perf_counter()
        device.enter()
        session = device.segment(engine / segment.file)
        took.append(time.perf_counter() - began)
        return session

    began = time.perf_counter()
    with ThreadPoolExecutor(int(way.split()[0]) if way[0].isdigit() else 1) as pool:
        loaded = dict(zip(segments, pool.map(one, segments), strict=True))
    whole = time.perf_counter() - began
    taken = free - machine.find_gpu().free - part.loaded_bytes
    results.add(
        "sessions",
        engine=engine.name,
        case=way,
        segments=len(segments),
        load_s=whole,
        first_s=took[0],
        others_ms=1e3 * statistics.median(took[1:]),
        beside_weights_mb=taken / 1e6,
    )
    if way == "in order":
        _runs(engine.name, device, loaded, weights, results)
        after = free - machine.find_gpu().free - part.loaded_bytes
        results.add("sessions", engine=engine.name, case="after runs", beside_mb=after / 1e6)


def _runs(
    name: str,
    device: gpus.Gpu,
    loaded: dict[Segment, Any],
    weights: PlacedWeights,
    results: Results,
) -> None:
    """The host's time of a run, of all graphs that take and give rows alone."""
    times, kept = [], []

    def tensor(spec: TensorSpec, called: str) -> Tensor:
        shape = tuple(dim if isinstance(dim, int) else 1 for dim in spec.shape)
        size = ITEM_BYTES[spec.dtype]
        for dim in shape:
            size *= dim
        kept.append(device.allocate(size))
        return Tensor(spec.name, spec.dtype, shape, kept[-1].address, called)

    for segment, session in loaded.items():
        specs = (*segment.inputs, *segment.outputs)
        if any(spec.dtype not in ("float16", "bfloat16") for spec in specs):
            continue
        called = segment.called
        inputs, outputs = (
            [tensor(s, called[s.name]) for s in side] for side in (segment.inputs, segment.outputs)
        )
        inputs += [weights[weight] for weight in segment.weights]
        work: Callable[[], None] = session.bind(inputs, outputs)
        work()
        device.wait()
        began = time.perf_counter()
        for _ in range(_RUNS):
            work()
        times.append((time.perf_counter() - began) / _RUNS)
        device.wait()
    results.add("runs", engine=name, segments=len(times), host_us=1e6 * statistics.median(times))


def apart(engine: Path, way: str, out: Path | None) -> None:
    """In a process of its own."""
    command = [sys.executable, __file__, str(engine), "--way", way]
    command += [] if out is None else ["--out", str(out)]
    assert subprocess.run(command, check=False).returncode == 0, way


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.way is not None:
        load(given.engine, given.way, Results(given.out))
        return
    attempts([(way, partial(apart, given.engine, way, given.out)) for way in WAYS])


if __name__ == "__main__":
    main()
