"""Histograms that are being made."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from msgspec import Struct, field

if TYPE_CHECKING:
    from vlmforge.outputs.metrics import Histogram

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

    def plus(self, other: Tally) -> Tally:
        """The values of both, as they are now."""
        counts = list(map(sum, zip(self.counts, other.counts, strict=True)))
        return Tally(self.bounds, counts, self.sum + other.sum)

    def now(self) -> Histogram:
        """The values so far."""
        from vlmforge.outputs.metrics import Histogram  # few ask

        return Histogram(self.bounds, tuple(self.counts), self.sum)
