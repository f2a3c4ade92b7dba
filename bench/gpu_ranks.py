"""Engines of several ranks on the GPUs of one machine: do they meet, answer, and how fast?

    python3 bench/gpu_ranks.py goldens ENGINES          # folders CHECKPOINT.KIND of several ranks
    python3 bench/gpu_ranks.py answers TWO              # steps that overlap, and one by one
    python3 bench/gpu_ranks.py speed ONE TWO --batch 1:1024 64:1024 --out results.json
    python3 bench/gpu_ranks.py speed ONE TWO --small 65536 524288
    python3 bench/gpu_ranks.py faults TWO --times 4     # a rank is killed while it answers

`speed` compares the first engine, of one rank, with the others of the same shape; what meeting
takes is the difference to the same steps in which each rank goes on with its own share. `--small`
compares bytes up to which sums go by our kernel, `--ways two` sums and norms by two kernels; with
`--one-by-one` no step is begun before one has ended; `--drawn` draws tokens instead of taking the
likeliest. Engines are made where the builder is: `bench/gpu_engines.py build ENGINES --kinds tp2`,
`bench/hollow.py build ... --tp 2`. Needs what serving needs.
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

PROGRAM, ALONE, SMALL = "gpu_ranks", "VLMFORGE_BENCH_ALONE", "VLMFORGE_BENCH_SMALL"
WAYS = {"two": "VLMFORGE_BENCH_TWO"}
DRAWN = {"top_k": 40, "top_p": 0.9, "temperature": 0.8}


def goldens(engines: Path) -> int:
    """See `gpu_engines.goldens`."""
    import gpu_engines

    return gpu_engines.goldens(engines)


def alone() -> None:
    """Have ranks of this process not meet: each copies what it gives."""
    from vlmforge.backends.cuda.meeting import GpuMeetings
    from vlmforge.backends.cuda.peers import load_kernels, norm_alone

    def bind(self: Any, call: Any, given: Tensor, out: Tensor) -> Work:
        del call
        gpu, size = self._gpu, int(np.prod(given.shape)) * ITEM_BYTES[given.dtype]

        def work() -> None:
            gpu.copy(given.address, out.address, size)

        return work

    def bind_norm(self: Any, call: Any) -> Work:
        return norm_alone(self._gpu, call, load_kernels(self._gpu, self._files))

    GpuMeetings.bind = bind  # type: ignore[method-assign, assignment]
    GpuMeetings.bind_norm = bind_norm  # type: ignore[method-assign]


def as_asked() -> None:
    """Have ranks of this process meet as the environment says."""
    if os.environ.get(ALONE):
        alone()
    if small := os.environ.get(SMALL):
        from vlmforge.backends.cuda import meeting

        meeting._SMALL = int(small)  # type: ignore[misc]
    if os.environ.get(WAYS["two"]):
        from vlmforge.backends.cuda.peers import Peers

        Peers.sum_and_norm = lambda self, call: None  # type: ignore[method-assign, assignment]


def one(engine: Path, wanted: list[str], *, one_by_one: bool, drawn: bool) -> list[dict[str, Any]]:
    """Steps of decoding of one engine, in this process and those that it starts."""
    import gpu_steps
    from gpu_results import Results
    from timeline import Steps

    as_asked()
    processes.CHILD = PROGRAM
    more: dict[str, Any] = DRAWN if drawn else {}
    sizes = [tuple(map(int, item.split(":"))) for item in wanted]
    rows: list[dict[str, Any]] = []
    with gpu_steps.opened(engine, max(batch for batch, _ in sizes), Results()) as pipe:
        if one_by_one:
            object.__setattr__(pipe._engine, "overlapping", None)
        for batch, context in sizes:
            steps = gpu_steps._LEAST_STEPS + 3 * batch
            prompts = [
                gpu_steps.text_of(pipe, context - steps + 24, index) for index in range(batch)
            ]
            generation = GenerationConfig(max_new_tokens=steps, ignore_eos=True, **more)
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


def speed(
    engines: list[Path], options: list[str], small: list[int], ways: list[str], out: Path | None
) -> None:
    """Each engine in a process of its own; those of several ranks also without meetings."""
    results: list[dict[str, Any]] = []
    for engine in engines:
        ranks = load_manifest(engine).parallel.tp
        kinds: list[dict[str, str]] = [{}]
        if ranks > 1:
            kinds = [*({SMALL: str(limit)} for limit in small), {ALONE: "1"}]
            kinds = kinds if small else [{}, *kinds]
            kinds = [*kinds, *({WAYS[way]: way} for way in ways)]
        for kind in kinds:
            apart, limit = ALONE in kind, int(kind.get(SMALL, 0))
            same = {"engine": engine.name, "ranks": ranks, "apart": apart, "small": limit}
            same["way"] = next((way for way in ways if WAYS[way] in kind), "")
            command = [sys.executable, str(ROOT / "bench" / "gpu_ranks.py"), "one", str(engine)]
            done = subprocess.run(
                [*command, *options],
                env=dict(os.environ) | kind,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
                timeout=400,
            )
            if done.returncode:
                print(f"{same}: FAILED with {done.returncode}", flush=True)
                continue
            for row in json.loads(done.stdout.splitlines()[-1]):
                results.append({**same, **row})
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
        words += f" (sums by us up to {row['small']} B)" if row["small"] else ""
        words += f" (norms: {row['way']})" if row["way"] else ""
        if (base := next(found(row, ranks=1), None)) is not None:
            words += f", {base['step_ms'] / row['step_ms']:.2f}x of one rank"
            words += f" (on the GPU {base['gpu_ms'] / row['gpu_ms']:.2f}x)"
        if (apart := next(found(row, engine=row["engine"], apart=True), None)) is not None:
            share = 1 - apart["gpu_ms"] / row["gpu_ms"]
            words += f"; meeting takes {share:.1%} of it"
        print(words, flush=True)


def answers(engine: Path) -> int:
    """Whether answers are those of steps one after the other; the number of kinds that differ."""
    import gpu_steps
    from gpu_results import Results

    lengths, wrong = (40, 7, 25, 1, 33, 40, 12, 39), 0
    with gpu_steps.opened(engine, len(lengths), Results()) as pipe:
        overlapping = pipe._engine.overlapping
        print("steps of the ranks overlap:", overlapping is not None, flush=True)
        asked = [gpu_steps.text_of(pipe, 60 + 30 * i, i) for i in range(len(lengths))]
        for name, more in {
            "greedy": {},
            "drawn": DRAWN,
            "penalty": {**DRAWN, "repetition_penalty": 1.3},
            "logprobs": {**DRAWN, "logprobs": 3},
        }.items():
            given: list[GenerationConfig] = [
                GenerationConfig(max_new_tokens=n, ignore_eos=True, random_seed=i, **more)  # type: ignore[arg-type]
                for i, n in enumerate(lengths)
            ]
            said = []
            for way in (overlapping, None):
                object.__setattr__(pipe._engine, "overlapping", way)
                found = pipe(asked, given, do_preprocess=False)
                said.append([answer.token_ids for answer in found])  # type: ignore[union-attr]
            same = said[0] == said[1]
            wrong += not same
            print(f"{name}: {'the same' if same else f'DIFFER: {said}'}", flush=True)
    return wrong


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
        as_asked()
        child.main(processes.Place.parsed(sys.argv[1]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("goldens").add_argument("engines", type=Path)
    for name in ("one", "speed"):
        timed = kinds.add_parser(name)
        timed.add_argument("engines", type=Path, nargs="+")
        timed.add_argument("--batch", nargs="+", default=["1:1024", "64:1024"])
        timed.add_argument("--one-by-one", action="store_true")
        timed.add_argument("--drawn", action="store_true")
        timed.add_argument("--ways", nargs="+", default=[], choices=WAYS)
        timed.add_argument("--small", type=int, nargs="+", default=[], metavar="BYTES")
        timed.add_argument("--out", type=Path)
    kinds.add_parser("answers").add_argument("engine", type=Path)
    killed = kinds.add_parser("faults")
    killed.add_argument("engine", type=Path)
    killed.add_argument("--times", type=int, default=4)
    given = parser.parse_args()
    try:
        if given.kind == "goldens":
            return goldens(given.engines)
        if given.kind == "faults":
            return min(1, faults(given.engine, given.times))
        if given.kind == "answers":
            return min(1, answers(given.engine))
        if given.kind == "one":
            how = {"one_by_one": given.one_by_one, "drawn": given.drawn}
            print(json.dumps(one(given.engines[0], given.batch, **how)))
        else:
            options = ["--batch", *given.batch]
            options += ["--one-by-one"] if given.one_by_one else []
            options += ["--drawn"] if given.drawn else []
            speed(given.engines, options, given.small, given.ways, given.out)
    except Exception:  # noqa: BLE001 - the next part is to run
        print("\n".join(traceback.format_exc().splitlines()[-25:]), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
