"""Timing on a GPU: work captured into CUDA graphs, contestants interleaved, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], None]


def captured(works: list[Work]) -> torch.cuda.CUDAGraph:
    """A graph of all of `works` in a row, so that launch gaps of Python stay out of the numbers."""
    works[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return graph


def medians(contestants: Mapping[str, list[Work]], seconds: float = 0.15) -> dict[str, float]:
    """Median seconds of one piece of work of each contestant; NaN for one that refused.

    Each contestant is a list of the same work on different buffers, so that one round reads more
    than the caches hold. Rounds of contestants alternate: a change of clocks meets them alike. In
    front of each timed round goes one of the same contestant that is not timed: where power limits
    the clocks, who comes after a slow one would run faster.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    refused: dict[str, float] = {}
    for name, works in contestants.items():
        try:
            graphs[name] = captured(works)
        except (RuntimeError, ValueError) as error:
            print(f"    {name}: {str(error).splitlines()[0][:90]}")
            refused[name] = float("nan")
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for turn in range(25):
        for name, graph in graphs.items():
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / len(contestants[name]))
        spent = 2 * sum(sum(t) * len(contestants[name]) for name, t in times.items())
        if turn >= 4 and spent > seconds:
            break
    return {name: statistics.median(t) for name, t in times.items()} | refused


def copy_bandwidths() -> dict[str, float]:
    """Bytes read plus written in a second while 4 GiB are copied within the device's memory.

    Three ways, for the first two can differ by half: a copy that is captured into a graph may be
    given to a copy engine, one that is launched runs on the multiprocessors. The ceiling is the
    best of them.
    """
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    moved = 2 * source.nbytes
    ways: dict[str, Work] = {
        "copied in a graph": lambda: target.copy_(source),
        "negated by a kernel": lambda: torch.neg(source, out=target),
    }
    found = {name: moved / medians({name: [work]}, 0.1)[name] for name, work in ways.items()}
    return found | {"copied": moved / _launched(lambda: target.copy_(source))}


def read_bandwidth() -> float:
    """Bytes read in a second by a sum over 4 GiB."""
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    return source.nbytes / medians({"sum": [lambda: torch.sum(source)]}, 0.1)["sum"]


def _launched(work: Work) -> float:
    """Median seconds of work that is launched, not replayed."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(12):
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations in a second of an 8192-cubed product of random matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = medians({"matmul": [lambda: torch.mm(a, b, out=out)]}, 0.5)["matmul"]
    return 2 * 8192**3 / seconds
