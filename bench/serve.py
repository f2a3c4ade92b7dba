"""How long do clients wait? Poisson arrivals at three loads: a table, and a picture.

    python bench/serve.py ENGINE --picture waits.png

Each request is a stream about a picture that the server has not seen. Loads are shares of what it
answers when all come at once. The server is a process of its own; clients are tasks of this one,
and take of the same processors.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from http_load import END_OF_BODY, body_of, encoded, new_questions, server

PIECE = b'"delta":{"content"'
LOADS = (0.3, 0.6, 0.9)


@dataclass(frozen=True)
class Times:
    """Of one request: seconds to its first text, and between its pieces."""

    first: float
    gaps: tuple[float, ...]


async def timed(port: int, request: bytes) -> Times:
    """Ask, and note when pieces come; those that come in one write have no gap between them."""
    began, marks, body = time.perf_counter(), list[float](), b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    while not body.endswith(END_OF_BODY):
        more = await reader.read(1 << 16)
        if not more:
            raise SystemExit(f"a stream without an end: {body[-300:]!r}")
        body += more
        marks += [time.perf_counter()] * (body.count(PIECE) - len(marks))
    writer.close()
    marks = marks or [time.perf_counter()]
    return Times(marks[0] - began, tuple(b - a for a, b in itertools.pairwise(marks)))


async def poisson(port: int, rate: float, count: int, seed: int) -> tuple[float, list[Times]]:
    """`count` requests that arrive at `rate` a second; seconds until the last has ended."""
    requests = [encoded(body_of(question)) for question in new_questions(count, seed)]
    chance, tasks = random.Random(seed), list[asyncio.Task[Times]]()
    began = due = time.perf_counter()
    for request in requests:
        tasks.append(asyncio.create_task(timed(port, request)))
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    times = await asyncio.gather(*tasks)
    return time.perf_counter() - began, times


def percentiles(values: Sequence[float]) -> str:
    """p50 / p95 / p99 in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return " / ".join(f"{1000 * cuts[at - 1]:.0f}" for at in (50, 95, 99))


def measure(engine: str, count: int, picture: Path | None) -> None:
    """Print a table of the loads."""
    with server(engine) as (url, _):
        port = int(url.rpartition(":")[2])
        asyncio.run(poisson(port, 50.0, 20, 1))  # warm
        seconds, _ = asyncio.run(poisson(port, 1e6, count, 2))
        most = count / seconds
        print(f"{count} at once: {most:.1f} requests/s (load average {os.getloadavg()[0]:.0f})\n")
        print("| load | arrive/s | answered/s | first token ms p50 / p95 / p99 | between tokens |")
        print("|---|---|---|---|---|")
        found: dict[str, list[Times]] = {}
        for number, share in enumerate(LOADS):
            seconds, times = asyncio.run(poisson(port, share * most, count, 3 + number))
            gaps = [gap for one in times for gap in one.gaps]
            first = percentiles([one.first for one in times])
            rates = f"{share * most:.1f} | {count / seconds:.1f}"
            print(f"| {share:.0%} | {rates} | {first} | {percentiles(gaps)} |", flush=True)
            found[f"{share:.0%}"] = times
    if picture is not None:
        plot(found, picture)


def plot(found: dict[str, list[Times]], picture: Path) -> None:
    """Shares of requests whose first token has come by a time, and of gaps that are no longer."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for name, times in found.items():
        gaps = [gap for one in times for gap in one.gaps]
        for axes, values in ((left, [one.first for one in times]), (right, gaps)):
            ordered = sorted(1000 * value for value in values)
            shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
            axes.step(ordered, shares, label=f"{name} load")
    left.set_xlabel("ms to the first token")
    right.set_xlabel("ms between tokens")
    left.set_ylabel("share")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    right.legend(loc="lower right")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine")
    parser.add_argument("--requests", type=int, default=200, help="of each load")
    parser.add_argument("--picture", type=Path, help="write a plot: .svg or .png")
    values = parser.parse_args()
    measure(values.engine, values.requests, values.picture)


if __name__ == "__main__":
    main()
