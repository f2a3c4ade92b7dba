"""What batching and the cache are worth: ratios within one run, and a picture of its steps.

    python bench/serving.py --engine out/bench/1b.engine --picture out/bench/steps.png

- 8 requests of mixed length at once, against the same 8 one after the other: tokens a second, of
  decoding (what answers twice as long take longer), and with the prompts.
- 32 requests that arrive at random (Poisson), against static batching: mean latency.
- The second turn about an image, against the first: time to the first token.

Each is measured in rounds that alternate between both sides; what is shown are medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from new_image import new_image
from timeline import Steps, draw
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Session, pipeline

SLOTS = 8
ANSWERS = (4, 8, 16, 32, 64)
"""Tokens of the answers to requests that arrive at random."""
WORDS = ["what", "do", "you", "see", "in", "this", "picture", "and", "why", "is", "it", "there"]
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: a prompt of so many words, an answer of exactly so many tokens."""

    words: int
    tokens: int
    arrival: float = 0.0

    @property
    def prompt(self) -> str:
        """A text that no cache has seen."""
        words = (WORDS[i % len(WORDS)] for i in range(self.words))
        return f"{next(_numbers)}: {' '.join(words)}"

    @property
    def config(self) -> GenerationConfig:
        """Greedy, to its length."""
        return GenerationConfig(max_new_tokens=self.tokens, ignore_eos=True)


MIXED = tuple(
    Asked(words, tokens)
    for words, tokens in zip(
        (5, 40, 10, 25, 8, 60, 15, 30), (32, 20, 36, 24, 40, 28, 32, 36), strict=True
    )
)


def together(pipe: Pipeline, requests: Sequence[Asked]) -> float:
    """Tokens a second of all at once."""
    begin = time.perf_counter()
    pipe([r.prompt for r in requests], [r.config for r in requests])
    return sum(r.tokens for r in requests) / (time.perf_counter() - begin)


def apart(pipe: Pipeline, requests: Sequence[Asked]) -> float:
    """Tokens a second of one after the other."""
    begin = time.perf_counter()
    for request in requests:
        pipe(request.prompt, request.config)
    return sum(r.tokens for r in requests) / (time.perf_counter() - begin)


def arrivals(count: int, rate: float, seed: int) -> list[Asked]:
    """`rate` requests a second, at random, with answers from short to long."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, count))
    words, tokens = rng.integers(5, 60, count), rng.choice(ANSWERS, count)
    return [Asked(int(w), int(n), float(t)) for w, n, t in zip(words, tokens, times, strict=True)]


def continuous(pipe: Pipeline, requests: Sequence[Asked]) -> list[float]:
    """Seconds from each one's arrival to the end of its answer, each sent when it arrives."""
    latencies = [0.0] * len(requests)
    begin = time.perf_counter()

    def serve(index: int) -> None:
        _until(begin + requests[index].arrival)
        pipe(requests[index].prompt, requests[index].config)
        latencies[index] = time.perf_counter() - begin - requests[index].arrival

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies


@dataclass(slots=True)
class Static:
    """Batches of those that wait, up to `SLOTS`; the next begins when the last answer is whole.

    `batch` is what a server that gives out whole batches has; `own` counts each answer as given out
    at its own end, though nobody's place is free before the batch's.
    """

    batch: list[float]
    own: list[float]


def static(pipe: Pipeline, requests: Sequence[Asked]) -> Static:
    """The same requests by static batching."""
    found, waiting, begin = Static([], []), list(requests), time.perf_counter()
    while waiting:
        _until(begin + waiting[0].arrival)
        now = time.perf_counter() - begin
        group = [request for request in waiting if request.arrival <= now][:SLOTS]
        waiting = waiting[len(group) :]
        prompts, configs = [r.prompt for r in group], [r.config for r in group]
        for piece in pipe.stream_infer(prompts, configs):
            if piece.finish_reason is not None:
                end = time.perf_counter() - begin
                found.own.append(end - group[piece.index].arrival)
        end = time.perf_counter() - begin
        found.batch += [end - request.arrival for request in group]
    return found


def _until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def turns(pipe: Pipeline, image: Image.Image) -> tuple[float, float, int, int]:
    """Seconds to the first token of a turn about a new image, and of the next turn about it.

    And the tokens of that turn: in all, and those that were in the cache.
    """
    session, found = Session(), list[float]()
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True)
    for text in ("What is shown in this picture?", "And what is beside it?"):
        asked = text if found else (text, image)
        begin = time.perf_counter()
        pieces = pipe.chat(asked, session, config, stream_response=True)
        first = next(iter(pieces))
        found.append(time.perf_counter() - begin)
        assert first.token_ids
        for _ in pieces:
            pass
    answer = session.response
    assert answer is not None
    return found[0], found[1], answer.input_token_len, answer.cached_tokens


def alternate(
    rounds: int, first: Callable[[int], float], second: Callable[[int], float]
) -> list[tuple[float, float]]:
    """Both sides' figures of each round; which comes first alternates."""
    found = []
    for index in range(rounds):
        if index % 2:
            other = second(index)
            found.append((first(index), other))
        else:
            found.append((first(index), second(index)))
    return found


def row(name: str, wanted: str, unit: str, pairs: Sequence[tuple[float, float]]) -> str:
    """A line of the table: medians of both, and the median of the ratios."""
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return f"| {name} | {ours:.3f} {unit} | {theirs:.3f} {unit} | {ratio:.2f} | {wanted} |"


def batching(pipe: Pipeline, rounds: int) -> list[str]:
    """8 at once against one after the other."""
    longer = [replace(request, tokens=2 * request.tokens) for request in MIXED]
    tokens = sum(request.tokens for request in MIXED)
    whole = alternate(rounds, lambda _: together(pipe, MIXED), lambda _: apart(pipe, MIXED))
    twice = alternate(rounds, lambda _: together(pipe, longer), lambda _: apart(pipe, longer))

    def decoding(once: float, again: float) -> float:
        return tokens / (2 * tokens / again - tokens / once)

    pairs = [(decoding(a, c), decoding(b, d)) for (a, b), (c, d) in zip(whole, twice, strict=True)]
    return [
        row("decoding 8 at once / one after the other", ">= 3", "tokens/s", pairs),
        row("the same, prompts included", "", "tokens/s", whole),
    ]


def poisson(pipe: Pipeline, rounds: int, rate: float) -> list[str]:
    """Random arrivals against static batching, its answers given out together or on their own."""
    own = list[float]()

    def theirs(index: int) -> float:
        found = static(pipe, arrivals(32, rate, index))
        own.append(statistics.fmean(found.own))
        return statistics.fmean(found.batch)

    def ours(index: int) -> float:
        return statistics.fmean(continuous(pipe, arrivals(32, rate, index)))

    pairs = [(b, a) for a, b in alternate(rounds, ours, theirs)]
    name = f"mean latency of 32 arrivals, {rate:.2f} a second: static / continuous"
    stricter = [(b, a) for b, (_, a) in zip(own, pairs, strict=True)]
    return [
        row(name, ">= 1.5", "s", pairs),
        row("the same, static answers counted to their own ends", "", "s", stricter),
    ]


def second_turn(pipe: Pipeline, rounds: int) -> list[str]:
    """The first token of the second turn about an image against that of the first."""
    found = [turns(pipe, new_image(index)) for index in range(rounds)]
    pairs = [(second, first) for first, second, _, _ in found]
    _, _, tokens, cached = found[-1]
    return [
        row("first token about an image: second turn / first", "<= 0.20", "s", pairs),
        f"\nOf the second turn's {tokens} tokens, {cached} were in the cache.",
    ]


def rate_for(speed: float) -> float:
    """Arrivals a second that keep an engine of that many tokens a second busy, not swamped."""
    return 0.7 * speed / statistics.fmean(ANSWERS)


def main() -> None:
    """Measure an engine and print the table; the picture lies beside this file."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--engine", type=Path, required=True)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--picture", type=Path, help="of 8 requests' steps, two with images")
    arguments.add_argument("--only", nargs="+", choices=("batching", "poisson", "turns"))
    values = arguments.parse_args()
    only = values.only or ("batching", "poisson", "turns")
    with pipeline(values.engine, backend_config=EngineConfig(max_batch_size=SLOTS)) as pipe:
        together(pipe, [Asked(5, 4)] * SLOTS)  # warm
        lines = [f"| {values.engine} | | | ratio | wanted |", "|---|---|---|---|---|"]
        if "batching" in only:
            lines += batching(pipe, values.rounds)
        if "poisson" in only:
            lines += poisson(pipe, values.rounds, rate_for(together(pipe, MIXED)))
        if "turns" in only:
            lines += second_turn(pipe, values.rounds)
        if values.picture is not None:
            draw(values.picture, _pictured(pipe))
            lines.append(f"\nSteps of such a load, two prompts with images: {values.picture}")
        print("\n" + "\n".join(lines) + "\n", flush=True)


def _pictured(pipe: Pipeline) -> Steps:
    """The steps of a mixed load."""
    prompts: list[object] = [request.prompt for request in MIXED]
    for index in (2, 5):
        prompts[index] = (MIXED[index].prompt, new_image(1000 + index))
    with Steps() as steps:
        pipe(prompts, [request.config for request in MIXED])
    return steps


if __name__ == "__main__":
    main()
