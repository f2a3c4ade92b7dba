"""Engines of several ranks on the GPUs of one machine: do they meet, answer, and how fast?

    python3 bench/gpu_ranks.py goldens ENGINES          # folders CHECKPOINT.KIND of several ranks
    python3 bench/gpu_ranks.py speed ONE TWO --batch 1:1024 64:1024 --out results.json
    python3 bench/gpu_ranks.py faults TWO --times 4     # a rank is killed while it answers

`speed` compares the first engine, of one rank, with the
others of the same shape; what meeting takes is the difference to the same steps in which each rank
goes on with its own share. Engines are made where the builder is: `bench/gpu_engines.py build
ENGINES --kinds tp2`, `bench/hollow.py build ... --tp 2`. Needs what serving needs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tests", "bench", "runtime", "plugins_cuda", "builder", "recipes", "scripts")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline  # noqa: E402
from vlmforge.backends.cuda.device import ITEM_BYTES, Tensor, Work  # noqa: E402
from vlmforge.backends.ranks import child, processes  # noqa: E402
from vlmforge.engine.manifest import load_manifest  # noqa: E402
from vlmforge.errors import RankError  # noqa: E402

PROGRAM, ALONE = "gpu_ranks", "VLMFORGE_BENCH_ALONE"


def goldens(engines: Path) -> int:
    """See `gpu_engines.goldens`."""
    import gpu_engines

    return gpu_engines.goldens(engines)


def alone() -> None:
    """Have ranks of this process not meet: each copies what it gives."""
    from vlmforge.backends.cuda.meeting import GpuMeetings

    def bind(self: Any, call: Any, given: Tensor, out: Tensor) -> Work:
        del call
        gpu, size = self._gpu, int(np.prod(given.shape)) * ITEM_BYTES[given.dtype]

        def work() -> None:
            gpu.copy(given.address, out.address, size)

        return work

    GpuMeetings.bind = bind  # type: ignore[method-assign, assignment]


def one(engine: Path, wanted: list[str]) -> list[dict[str, Any]]:
    """Steps of decoding of one engine, in this process and those that it starts."""
    import gpu_steps
    from gpu_results import Results
    from timeline import Steps

    if os.environ.get(ALONE):
        alone()
        processes.CHILD = PROGRAM
    sizes = [tuple(map(int, item.split(":"))) for item in wanted]
    rows: list[dict[str, Any]] = []
    with gpu_steps.opened(engine, max(batch for batch, _ in sizes), Results()) as pipe:
        for batch, context in sizes:
            steps = gpu_steps._LEAST_STEPS + 3 * batch
            prompts = [
                gpu_steps.text_of(pipe, context - steps + 24, index) for index in range(batch)
            ]
            generation = GenerationConfig(max_new_tokens=steps, ignore_eos=True)
            found = []
            for turn in range(4):  # the first captures
                with Steps() as noted, gpu_steps.stamped() as stamps:
                    pipe(prompts, generation, do_preprocess=False)
                    if turn:
                        found.append(gpu_steps.figures(noted.records, stamps, batch))
            best = sorted(found, key=lambda row: row["step_ms"])[len(found) // 2]
            kept = ("batch", "context", "step_ms", "gpu_ms", "idle", "prompts_s")
            rows.append({key: best[key] for key in kept})
    return rows


def speed(engines: list[Path], wanted: list[str], out: Path | None) -> None:
    """Each engine in a process of its own; those of several ranks also without meetings."""
    results: list[dict[str, Any]] = []
    for engine in engines:
        ranks = load_manifest(engine).parallel.tp
        for apart in (False, True) if ranks > 1 else (False,):
            environment = dict(os.environ) | ({ALONE: "1"} if apart else {})
            command = [sys.executable, str(ROOT / "bench" / "gpu_ranks.py"), "one", str(engine)]
            done = subprocess.run(
                [*command, "--batch", *wanted],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
                timeout=400,
            )
            if done.returncode:
                print(f"{engine.name}, apart {apart}: FAILED with {done.returncode}", flush=True)
                continue
            rows = json.loads(done.stdout.splitlines()[-1])
            for row in rows:
                results.append({"engine": engine.name, "ranks": ranks, "apart": apart, **row})
                print(results[-1], flush=True)
    _compared(results)
    if out is not None:
        out.write_text(json.dumps(results, indent=1), "utf-8")


def _compared(results: list[dict[str, Any]]) -> None:
    def found(row: dict[str, Any], **same: Any) -> Iterator[dict[str, Any]]:
        wanted = {"batch": row["batch"], **same}
        return (r for r in results if all(r[key] == value for key, value in wanted.items()))

    for row in results:
        if row["ranks"] == 1 or row["apart"]:
            continue
        words = f"{row['engine']}, batch {row['batch']}: step {row['step_ms']} ms"
        if (base := next(found(row, ranks=1), None)) is not None:
            words += f", {base['step_ms'] / row['step_ms']:.2f}x of one rank"
            words += f" (on the GPU {base['gpu_ms'] / row['gpu_ms']:.2f}x)"
        if (apart := next(found(row, engine=row["engine"], apart=True), None)) is not None:
            share = 1 - apart["gpu_ms"] / row["gpu_ms"]
            words += f"; meeting takes {share:.1%} of it"
        print(words, flush=True)


def faults(engine: Path, times: int) -> int:
    """Kill the second rank at random while it answers; the number of times that went wrong."""
    wrong = 0
    for number in range(times):
        with _answering(engine) as (pipe, found):
            time.sleep(0.3 + 0.7 * number)
            victim = pipe._engine.decoder._others._children[1].pid  # type: ignore[attr-defined]
            begun = time.monotonic()
            os.kill(victim, signal.SIGSTOP if number % 4 == 3 else signal.SIGKILL)
            while not found and time.monotonic() < begun + 20:
                time.sleep(0.01)
            took = time.monotonic() - begun
            fine = bool(found) and isinstance(found[0], RankError) and took < 5
        closed = time.monotonic() - begun - took
        words = str(found[0]).replace("\n", "; ") if found else "nothing"
        print(f"{'ok' if fine else 'WRONG'}: after {took:.2f} s {words}; closed in {closed:.2f} s")
        wrong += not fine
    with _answering(engine) as (pipe, _):
        print("a new pipeline answers:", pipe("Hello.", GenerationConfig(max_new_tokens=4)).text)  # type: ignore[union-attr]
    return wrong


@contextmanager
def _answering(engine: Path) -> Iterator[tuple[Pipeline, list[BaseException]]]:
    found: list[BaseException] = []
    with pipeline(engine, EngineConfig(max_batch_size=2)) as pipe:

        def ask() -> None:
            try:
                while True:
                    pipe("Hello.", GenerationConfig(max_new_tokens=200, ignore_eos=True))
            except Exception as error:  # noqa: BLE001 - told to the one that waits
                found.append(error)

        threading.Thread(target=ask, daemon=True).start()
        yield pipe, found


def main() -> int:
    """The command line."""
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        alone()
        child.main(processes.Place.parsed(sys.argv[1]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("goldens").add_argument("engines", type=Path)
    for name in ("one", "speed"):
        timed = kinds.add_parser(name)
        timed.add_argument("engines", type=Path, nargs="+")
        timed.add_argument("--batch", nargs="+", default=["1:1024", "64:1024"])
        timed.add_argument("--out", type=Path)
    killed = kinds.add_parser("faults")
    killed.add_argument("engine", type=Path)
    killed.add_argument("--times", type=int, default=4)
    given = parser.parse_args()
    try:
        if given.kind == "goldens":
            return goldens(given.engines)
        if given.kind == "faults":
            return min(1, faults(given.engine, given.times))
        if given.kind == "one":
            print(json.dumps(one(given.engines[0], given.batch)))
        else:
            speed(given.engines, given.batch, given.out)
    except Exception:  # noqa: BLE001 - the next part is to run
        print("\n".join(traceback.format_exc().splitlines()[-25:]), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
