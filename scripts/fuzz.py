"""Fuzzed requests at a fixed memory ceiling: no crash, no hang, no untyped error, no lost memory.

    export PYTHONMALLOC=malloc
    python scripts/fuzz.py [--seed 0] [--requests 10000] [--memory 3.0] [--engine ENGINE]

Without the variable Python keeps a MiB of its own for as long as one object is in it: memory that
is free would count as lost.

Prompts of 0 to 64 images of 1 pixel to 100 megapixels and of up to twice the window, in every form
of call, some of them cancelled, some with bad values; eight callers at once. Prints what came of
them. Status 1 if anything was as it must not be; 3, with the stacks of all threads, if a request
hangs. `--number N` sends only the request of that number, and says what came of it.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
from pathlib import Path

from callers import Callers, of_files, resident_bytes, settle
from drawn_requests import Drawing, draw_pictures
from sent_requests import send
from vlmforge import EngineConfig, Pipeline, pipeline
from vlmforge.limits import physical_cores, return_freed_memory

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "recipes/vlmforge_recipes/llava/demo/checkpoint"
MIB = 1 << 20
MOST_THREADS = 16
LOOKS = (1000, 2000, 4000, 7000)
"""Prompts after which memory is looked at between the first time and the last."""


def main() -> int:
    """Send the requests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--memory", type=float, default=3.0, help="address space, GiB")
    parser.add_argument("--engine", default=str(CHECKPOINT))
    parser.add_argument("--work", type=Path, default=ROOT / "out/fuzz", help="for the pictures")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--hangs", type=float, default=300.0, help="seconds")
    parser.add_argument("--no-large", action="store_true", help="no pictures of 100 megapixels")
    parser.add_argument("--largest-first", type=int, default=16, help="requests")
    parser.add_argument("--warm", type=int, default=500, help="prompts before the first look")
    parser.add_argument("--growth", type=float, default=0.02, help="of memory, at most")
    parser.add_argument("--number", type=int, help="send only the request of this number")
    given = parser.parse_args()
    limit = int(given.memory * (1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return run(given)


def run(given: argparse.Namespace) -> int:
    """Open the pipeline, send, compare; the status."""
    given.work.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(given.work, large=not given.no_large)
    # Each thread has 8 MiB of address space for its stack: on many cores those alone would fill it.
    threads = min(physical_cores(), MOST_THREADS)
    with pipeline(given.engine, EngineConfig(max_batch_size=4, threads=threads)) as pipe:
        window = pipe._engine.options.capacity
        # Before memory is looked at first, each thread's buffers have grown as much as they may.
        drawing = Drawing(given.seed, pictures, window, largest_first=given.largest_first)
        if given.number is not None:
            drawn = drawing.request(given.number)
            print(drawn, *send(pipe, drawn, window), sep="\n")
            return 0
        callers = Callers(pipe, drawing, window, hangs=given.hangs)
        begun = time.monotonic()
        warm = min(given.warm, given.requests // 2)
        between = [count for count in LOOKS if warm < count < given.requests]
        memory: list[int] = []
        for count in (warm, *between, given.requests):
            callers.run(given.callers, lambda until=count: callers.sent < until)
            memory.append(memory_at_rest(pipe))
            kept = pipe._scheduler._features.bytes
            print(
                f"resident after {callers.sent}: {memory[-1] / MIB:.1f} MiB, "
                f"{of_files() / MIB:.1f} of them of files; {kept / MIB:.1f} of features beside",
                flush=True,
            )
        seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{callers.sent} prompts, {callers.tokens} tokens in {seconds:.0f} s, seed {given.seed}")
    for end, count in callers.outcomes.most_common():
        print(f"  {count:6d} {end}")
    print(f"most at any time: {peak / MIB:.0f} MiB, address space of {given.memory:g} GiB")
    growth = memory[-1] / memory[0] - 1
    print(f"growth {growth:+.2%}; {len(callers.faults)} faults")
    return int(bool(callers.faults) or growth > given.growth)


def memory_at_rest(pipe: Pipeline) -> int:
    """Resident bytes when nothing is asked, and the cache holds what it always does then.

    Features of the images that were seen are kept up to a number of bytes: those are left out.
    """
    settle(pipe, pipe._engine.options.slots)
    gc.collect()
    return_freed_memory()
    return resident_bytes() - pipe._scheduler._features.bytes


if __name__ == "__main__":
    sys.exit(main())
