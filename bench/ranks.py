"""What several ranks cost on this machine: the time of a step, the share of it in which they meet.

    python bench/ranks.py out/1b out/1b.tp2 --threads 2
    python bench/ranks.py out/1b out/1b.tp2 out/1b.tp4 --memory

The first engine is of one rank, the others of the same weights. All have as many threads in all.
They are asked in turn, `--rounds` times; what is shown are medians, and the median of the rounds'
ratios to one rank. With `--memory`, each is loaded alone and answers once; what is shown is the
peak of each process, and what it may be: its weights, the same of what is not divided, and 0.3 GB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline
from vlmforge.backends.chained import ChainedDecoder
from vlmforge.backends.ranks.calls import RankedDecoder
from vlmforge.engine.manifest import Manifest, decoder_name, load_manifest

WORD = "word "
MORE = 0.3e9


@dataclass(frozen=True)
class Found:
    """Seconds of a step of decoding and of a prompt, and the share of each spent meeting."""

    step: float
    step_share: float
    prompt: float
    prompt_share: float


def met(pipe: Pipeline) -> float:
    """Seconds that the first rank has spent where ranks meet."""
    decoder = pipe._engine.decoder
    if not isinstance(decoder, RankedDecoder):
        return 0.0
    assert isinstance(decoder.own, ChainedDecoder)
    return decoder.own.meetings.seconds


def measure(pipe: Pipeline, prompts: int, length: int, tokens: int) -> Found:
    """Ask so many prompts of so many words at once, for so many tokens each."""
    config = GenerationConfig(max_new_tokens=1)
    before = met(pipe)
    (alone,) = pipe([WORD * length], config)
    prompt, prompt_met = alone.timings.prefill, met(pipe) - before
    config = GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
    short = [f"{i}" for i in range(prompts)]
    pipe(short, GenerationConfig(max_new_tokens=1))  # what they begin with is cached now
    before, begun = met(pipe), time.perf_counter()
    answers = pipe(short, config)
    whole = time.perf_counter() - begun
    decode = statistics.median(answer.timings.decode for answer in answers)
    return Found(decode / (tokens - 1), (met(pipe) - before) / whole, prompt, prompt_met / prompt)


def compare(engines: list[Path], threads: int, rounds: int, prompts: int, length: int) -> None:
    """Print a line for each engine."""
    config = EngineConfig(
        threads=threads, max_batch_size=prompts, session_len=1024, enable_prefix_caching=False
    )
    pipes = [pipeline(engine, config) for engine in engines]
    found: list[list[Found]] = [[] for _ in pipes]
    for number in range(rounds + 1):
        order = range(len(pipes)) if number % 2 else range(len(pipes) - 1, -1, -1)
        for index in order:
            values = measure(pipes[index], prompts, length, 24)
            if number:  # the first warms up
                found[index].append(values)
    for pipe, rows in zip(pipes, found, strict=True):
        ratio = _median(row.step / one.step for row, one in zip(rows, found[0], strict=True))
        prefill = _median(row.prompt / one.prompt for row, one in zip(rows, found[0], strict=True))
        print(
            f"tp={pipe.manifest.parallel.tp}, {threads} threads in all: "
            f"step of {prompts}: {1e3 * _median(r.step for r in rows):.2f} ms ({ratio:.2f}x), "
            f"{_median(r.step_share for r in rows):.0%} of it meeting; "
            f"prompt of {length} words: {1e3 * _median(r.prompt for r in rows):.0f} ms "
            f"({prefill:.2f}x), {_median(r.prompt_share for r in rows):.0%} of it meeting"
        )
        pipe.close()


def _median(values: object) -> float:
    return statistics.median(values)  # type: ignore[call-overload, no-any-return]


def memory(engine: Path, threads: int) -> None:
    """Print the peak memory of each rank."""
    manifest = load_manifest(engine)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    config = EngineConfig(threads=threads, max_batch_size=1, session_len=1024)
    with pipeline(engine, config) as pipe:
        pipe(WORD * 300, GenerationConfig(max_new_tokens=8))
        ranks = [os.getpid(), *_others(pipe)]
        for rank, process in enumerate(ranks):
            peak, bound = _peak(process), _bound(manifest, rank)
            print(
                f"tp={manifest.parallel.tp}, rank {rank}: peak {peak / 1e9:.2f} GB, "
                f"may be {bound / 1e9:.2f}: {'ok' if peak <= bound else 'MORE'}"
            )
    os._exit(0)


def _others(pipe: Pipeline) -> list[int]:
    decoder = pipe._engine.decoder
    if not isinstance(decoder, RankedDecoder):
        return []
    return [process.pid for process in decoder._others._children.values()]  # type: ignore[attr-defined]


def _peak(process: int) -> int:
    """Bytes that were resident at most, those of mapped files included."""
    lines = Path(f"/proc/{process}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _bound(manifest: Manifest, rank: int) -> float:
    vision = manifest.part("vision").loaded_bytes if rank == 0 else 0
    return manifest.part(decoder_name(rank)).loaded_bytes + vision + MORE


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("engines", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    if given.memory:
        for engine in given.engines:
            memory(engine, given.threads)
        return
    for prompts in given.prompts:
        compare(given.engines, given.threads, given.rounds, prompts, given.length)


if __name__ == "__main__":
    main()
