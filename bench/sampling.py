"""What choosing tokens costs beside the decode step that gives their logits.

    python bench/sampling.py --engine out/bench/1b.engine

Loads an engine (`bench/compare.py` builds that of 1 B weights), decodes `--rows` sequences at once
that are `--past` tokens long, and lets a `Sampler` for each choose from logits of a vocabulary of
`--vocab`, by turns. Prints medians over `--rounds`, and the share of a step. Shorter sequences than
real ones make the step cheaper and the share larger. At most 3 % is what is aimed at.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlmforge import EngineConfig, pipeline
from vlmforge.outputs.sampling import Sampler, SamplingParams

SETTINGS = {
    "greedy": SamplingParams(),
    "top_k=40, top_p=0.8": SamplingParams(False, 0.8, 40, 0.8, seed=1),
    "top_k=40, top_p=0.8, repetition_penalty=1.1": SamplingParams(
        False, 0.8, 40, 0.8, repetition_penalty=1.1, seed=1
    ),
    "top_p=0.9": SamplingParams(False, 0.8, 0, 0.9, seed=1),
    "min_p=0.05": SamplingParams(False, 0.8, min_p=0.05, seed=1),
    "temperature alone": SamplingParams(False, 0.8, seed=1),
    "greedy, logprobs=5": SamplingParams(logprobs=5),
}
PROMPT = 600


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(engine: Path, rows: int, vocab: int, past: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    # The tails of real ones are lighter: more tokens matter here, and sorting them costs more.
    logits = (3 * rng.standard_normal((rows, vocab))).astype(np.float32)
    samplers = {
        name: [Sampler(params, vocab, range(PROMPT)) for _ in range(rows)]
        for name, params in SETTINGS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in ("step", *SETTINGS)}
    with pipeline(engine, EngineConfig(max_batch_size=rows, session_len=past + rounds + 2)) as pipe:
        loaded = pipe._engine
        tokens = np.full(rows, 5, np.int64)

        def step(number: int) -> None:
            lengths = np.full(rows, past + number, np.int64)
            loaded.decode(range(rows), tokens, lengths, np.zeros(rows, np.int64))

        step(0)
        for number in range(1, rounds + 1):
            times["step"].append(seconds(lambda number=number: step(number)))
            for name, given in samplers.items():
                choose = (sampler.step for sampler in given)
                times[name].append(
                    seconds(lambda: [f(row) for f, row in zip(choose, logits, strict=True)])  # noqa: B023
                )
    whole = statistics.median(times.pop("step"))
    print(f"a decode step of {rows} sequences of {past} tokens: {1e3 * whole:.1f} ms")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:45} {1e3 * median:7.2f} ms  {100 * median / whole:5.2f} %")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--engine", type=Path, default=Path("out/bench/1b.engine"))
    arguments.add_argument("--rows", type=int, default=32)
    arguments.add_argument("--vocab", type=int, default=32_000)
    arguments.add_argument("--past", type=int, default=64)
    arguments.add_argument("--rounds", type=int, default=5)
    measure(**vars(arguments.parse_args()))
