"""What a pipeline has done and is doing, as plain data."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import Struct, field


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values there were of each size.

    Attributes:
        bounds: Upper bounds of the first buckets, growing, each belonging to its bucket.
        counts: Values in each bucket; one more than there are bounds.
        sum: Of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Of all values; 0 if there were none."""
        return self.sum / self.count if self.count else 0.0

    def at_most(self) -> tuple[tuple[float, int], ...]:
        """Each bound, infinity last, and how many values are not above it."""
        total, found = 0, list[tuple[float, int]]()
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            found.append((bound, total))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Everything since the pipeline was made, but for what is marked "now".

    Attributes:
        requests: Answers that have ended, by how: "stop", "length", "abort" or "error".
        errors: Of those that ended with an error, by its code.
        prompt_tokens: Of answers that ended without one.
        cached_tokens: Of these, those that needed no prefill.
        generated_tokens: In answers.
        images_encoded: Runs of the vision part, counted by images.
        images_cached: Images of prompts that needed none.
        preemptions: How often a running request had to give up its place to another.
        waiting: Requests that wait, or are being prepared, now.
        running: Requests that run now.
        blocks_used: Blocks of the key/value cache with tokens in them now, leftovers included.
        blocks_total: Blocks that there may be.
        step_seconds: Of each step of the engine.
        step_host_share: The part of each step's time that was not spent inside the engine's parts.
        first_token_seconds: From the request to its first token.
        between_tokens_seconds: Between a request's tokens, once for each token.
        request_seconds: From the request to its end, whatever that was.
    """

    requests: Mapping[str, int]
    errors: Mapping[str, int]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    images_encoded: int
    images_cached: int
    preemptions: int
    waiting: int
    running: int
    blocks_used: int
    blocks_total: int
    step_seconds: Histogram
    step_host_share: Histogram
    first_token_seconds: Histogram
    between_tokens_seconds: Histogram
    request_seconds: Histogram


SECONDS = tuple(scale * step for scale in (0.001, 0.01, 0.1, 1.0, 10.0) for step in (1, 2, 5))
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class Tally(Struct):
    """A histogram that is being made. One thread adds; any may look at it."""

    bounds: tuple[float, ...] = SECONDS
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        """Note a value, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def plus(self, other: Tally) -> Histogram:
        """The values of both, as they are now."""
        counts = tuple(map(sum, zip(self.counts, other.counts, strict=True)))
        return Histogram(self.bounds, counts, self.sum + other.sum)

    def now(self) -> Histogram:
        """The values so far."""
        return Histogram(self.bounds, tuple(self.counts), self.sum)
