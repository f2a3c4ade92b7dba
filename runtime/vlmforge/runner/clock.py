"""Time inside of an engine's parts; what remains of a step is the host's own."""

from __future__ import annotations

import time

from msgspec import Struct


class PartClock(Struct):
    """Seconds that the parts have run, ever. One thread runs them; any may look.

    A `with` on it, and no generator, as it is of every step: a part runs.
    """

    seconds: float = 0.0
    _begun: float = 0.0

    def running(self) -> PartClock:
        """For a `with` in which a part runs."""
        return self

    def add(self, seconds: float) -> None:
        """A part has run for so long, while this thread did something else."""
        self.seconds += seconds

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begun
