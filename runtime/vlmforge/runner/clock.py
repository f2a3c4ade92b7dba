"""Time inside of an engine's parts; what remains of a step is the host's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class PartClock:
    """Seconds that the parts have run, ever. One thread runs them; any may look."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A part runs."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begun
