"""What a large engine gives many requests at once on a GPU, and how soon after its start.

    python3 bench/gpu_serving.py text images start ENGINE --out results.jsonl
    python3 bench/gpu_serving.py text ENGINE --chunk 1024 2048 4096 --together 8 32 128

`text`: 8, 32, 64 and 128 requests of 640 + 128 tokens; `images`: 64 requests of 64 tokens and an
image each, all different, answered in 128; greedy, prefix caching off, all at once, medians of
whole runs behind one that is not counted. `start`: a process of its own, from its beginning to a
pipeline that answers; its files are in the system's cache.

`--chunk`: tokens of prompts that are run at once, one pipeline for each. Of each run is told how
fast prompts went while they ran (with the tokens of others that were in their steps), and what part
of the time the device did something at all. `--apart`: prompts have steps of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpu_results import Results, Row, attempts, middle
from gpu_steps import CHUNK, ROOT, picture, text_of
from timeline import Steps
from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline
from vlmforge.runner.step import StepRecord
from vlmforge.runner.work import Work

TOGETHER = (8, 32, 64, 128)
PROMPT, ANSWER, IMAGE, IMAGES = 640, 128, 576, 64
WINDOW = 1024
_START = """
import sys, time
sys.path[:0] = {path}
began = time.time()
from vlmforge import GenerationConfig, pipeline
with pipeline({engine}, max_batch_size=64) as pipe:
    ready = time.time()
    pipe("hi", GenerationConfig(max_new_tokens=1, ignore_eos=True))
    print(began, ready, time.time())
"""


def opened(engine: Path, slots: int, chunk: int) -> Pipeline:
    """Of short windows, so that its pool is for as many requests as there are."""
    config = EngineConfig(
        session_len=WINDOW,
        max_batch_size=slots,
        max_prefill_token_num=chunk,
        enable_prefix_caching=False,
        cache_max_entry_count=0.95,
    )
    return pipeline(engine, config)


def text(
    engine: Path, results: Results, chunk: int, together: Sequence[int] = TOGETHER, times: int = 3
) -> None:
    """Tokens a second of so many requests at once."""
    with opened(engine, max(together), chunk) as pipe:
        texts = [text_of(pipe, PROMPT, index) for index in range(max(together))]
        for count in together:
            row = served(pipe, texts[:count], do_preprocess=False, times=times)
            results.add("text", engine=engine.name, batch=count, case=f"chunk {chunk}", **row)


def images(engine: Path, results: Results, chunk: int, count: int = IMAGES, times: int = 3) -> None:
    """Requests a second, each about an image of its own that was never seen before."""
    with opened(engine, count, chunk) as pipe:
        fresh = iter(range(10_000))

        def asked() -> list[Any]:
            seeds = [next(fresh) for _ in range(count)]
            return [text_of(pipe, IMAGE + 64, seed, picture(seed)) for seed in seeds]

        row = served(pipe, asked, do_preprocess=True, times=times)
        results.add("images", engine=engine.name, batch=count, case=f"chunk {chunk}", **row)


def served(
    pipe: Pipeline,
    asked: list[Any] | Callable[[], list[Any]],
    *,
    do_preprocess: bool,
    times: int = 3,
) -> Row:
    """Medians of whole runs, from the call to its last answer."""
    generation = GenerationConfig(max_new_tokens=ANSWER, ignore_eos=True)
    runs: list[Row] = []
    for _ in range(times + 1):
        prompts = asked() if callable(asked) else asked
        with Steps() as steps:
            began = time.perf_counter()
            firsts, ends, lengths = _timed(pipe, prompts, generation, do_preprocess)
            wall = time.perf_counter() - began
        assert set(lengths) == {ANSWER}, lengths
        gaps = [(end - first) / (ANSWER - 1) for first, end in zip(firsts, ends, strict=True)]
        runs.append(
            {
                "requests_per_s": len(prompts) / wall,
                "tokens_per_s": len(prompts) * ANSWER / wall,
                "first_token_ms": float(np.mean([first - began for first in firsts])) * 1e3,
                "last_first_token_ms": (max(firsts) - began) * 1e3,
                "gap_ms": middle(gaps) * 1e3,
                **_of_steps(steps.records, wall),
            }
        )
    found = {key: middle([run[key] for run in runs[1:]]) for key in runs[0]}
    return {**found, "preemptions": pipe.metrics().preemptions}


def _of_steps(records: Sequence[StepRecord], wall: float) -> Row:
    """What the device did, by its own clock (by the host's in steps that do not overlap)."""
    prompts = [record for record in records if record.step.prompts]
    tokens = sum(len(row.tokens) for record in prompts for row in record.step.prompts)
    prompt, decode = (sum(getattr(r, kind) for r in records) for kind in ("prompt", "decode"))
    return {
        "steps": len(records),
        "prompt_steps": len(prompts),
        "prompt_tokens_per_s": tokens / max(prompt, 1e-9),
        "prompt_s": prompt,
        "decode_s": decode,
        "device_busy": (prompt + decode) / wall,
    }


def _timed(
    pipe: Pipeline, prompts: list[Any], generation: GenerationConfig, do_preprocess: bool
) -> tuple[list[float], list[float], list[int]]:
    """When the first and the last token of each came, and how many there were."""
    firsts, ends, lengths = ([0.0] * len(prompts), [0.0] * len(prompts), [0] * len(prompts))
    for piece in pipe.stream_infer(prompts, generation, do_preprocess):
        assert piece.finish_reason != "error", piece
        ends[piece.index] = time.perf_counter()
        firsts[piece.index] = firsts[piece.index] or ends[piece.index]
        lengths[piece.index] += len(piece.token_ids)
    return firsts, ends, lengths


def start(engine: Path, results: Results) -> None:
    """Seconds until a new process answers."""
    path = [str(ROOT / folder) for folder in ("runtime", "plugins_cuda")]
    program = _START.format(path=path, engine=repr(str(engine)))
    found = []
    for _ in range(2):
        began = time.time()
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        imports, ready, first = map(float, done.stdout.split()[-3:])
        found.append((ready - began, ready - imports, first - began))
    whole, loading, answered = min(found)
    results.add(
        "start", engine=engine.name, ready_s=whole, pipeline_s=loading, first_answer_s=answered
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="+", choices=("text", "images", "start"))
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chunk", type=int, nargs="+", default=[CHUNK])
    parser.add_argument("--together", type=int, nargs="+", default=list(TOGETHER))
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--apart", action="store_true")
    given = parser.parse_args()
    if given.apart:
        Work.mixes = lambda *_: False  # type: ignore[method-assign]
    results, engine, times = Results(given.out), given.engine, given.times
    works: list[tuple[str, Callable[[], object]]] = []
    for kind in given.kinds:
        if kind == "start":
            works.append((f"start {engine.name}", lambda: start(engine, results)))
            continue
        for chunk in given.chunk:
            work: Callable[[], object] = (
                partial(text, engine, results, chunk, given.together, given.times)
                if kind == "text"
                else partial(images, engine, results, chunk, times=times)
            )
            works.append((f"{kind} {engine.name}, chunk {chunk}", work))
    attempts(works)


if __name__ == "__main__":
    main()
