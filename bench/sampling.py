"""What choosing tokens costs beside the decode step that gives their logits.

    python bench/sampling.py --engine out/bench/1b.engine

Loads an engine (`bench/compare.py` builds that of 1 B weights), decodes `--rows` sequences at once
that are `--past` tokens long, and lets a `Sampler` for each choose from logits of a vocabulary of
`--vocab`, by turns. Prints medians over `--rounds`, and the share of a step: of its time, and of
its processors' time, which hangs less on who else uses the machine. Shorter sequences than real
ones make the step cheaper and the share larger. At most 3 % is what is aimed at.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmforge import EngineConfig, pipeline
from vlmforge.limits import physical_cores
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


@dataclass
class Spent:
    """Seconds of each round: by the clock, and of one processor."""

    wall: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def add(self, call: Callable[[], object], processors: int) -> None:
        """A round; its work is that of so many processors."""
        wall, busy = time.perf_counter(), time.process_time()
        call()
        self.wall.append(time.perf_counter() - wall)
        self.busy.append((time.process_time() - busy) / processors)

    def medians(self) -> tuple[float, float]:
        """Of both."""
        return statistics.median(self.wall), statistics.median(self.busy)


def measure(engine: Path, rows: int, vocab: int, past: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    # The tails of real ones are lighter: more tokens matter here, and sorting them costs more.
    logits = (3 * rng.standard_normal((rows, vocab))).astype(np.float32)
    samplers = {
        name: [Sampler(params, vocab, range(PROMPT)) for _ in range(rows)]
        for name, params in SETTINGS.items()
    }
    times = {name: Spent() for name in ("step", *SETTINGS)}
    with pipeline(engine, EngineConfig(max_batch_size=rows, session_len=past + rounds + 2)) as pipe:
        loaded = pipe._engine
        tokens, places = np.full(rows, 5, np.int64), [(row,) for row in range(rows)]

        def step(number: int) -> None:
            lengths = np.full(rows, past + number, np.int64)
            loaded.decode(places, tokens, lengths, np.zeros(rows, np.int64))

        step(0)
        for number in range(1, rounds + 1):
            times["step"].add(functools.partial(step, number), physical_cores())
            for name, given in samplers.items():
                times[name].add(functools.partial(choose, given, logits), 1)
    report(f"a decode step of {rows} sequences of {past} tokens", times)


def choose(samplers: list[Sampler], logits: NDArray[np.float32]) -> None:
    for sampler, row in zip(samplers, logits, strict=True):
        sampler.step(row)


def report(what: str, times: dict[str, Spent]) -> None:
    wall, busy = times.pop("step").medians()
    print(f"{what}: {1e3 * wall:.1f} ms; each processor was busy for {1e3 * busy:.1f} ms")
    print("| chosen by | ms | of the step | ms busy | of the step's |\n|---|---|---|---|---|")
    for name, found in times.items():
        whole, own = found.medians()
        print(
            f"| {name} | {1e3 * whole:.1f} | {whole / wall:.2%} | {1e3 * own:.1f} "
            f"| {own / busy:.2%} |"
        )


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--engine", type=Path, default=Path("out/bench/1b.engine"))
    arguments.add_argument("--rows", type=int, default=32)
    arguments.add_argument("--vocab", type=int, default=32_000)
    arguments.add_argument("--past", type=int, default=64)
    arguments.add_argument("--rounds", type=int, default=5)
    measure(**vars(arguments.parse_args()))
