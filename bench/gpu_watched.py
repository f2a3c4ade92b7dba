"""When a decoder's steps begin and end, on the host and on the device."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class BegunStep:
    """A step that is begun and waited for later: the device's moments, and the host's seconds."""

    inner: Any
    rows: int
    held: int
    begin: float
    waited: float = 0.0

    @property
    def seconds(self) -> float:
        """See `Begun`."""
        return float(self.inner.seconds)

    def wait(self) -> Any:
        """See `Begun`."""
        began = time.perf_counter()
        found = self.inner.wait()
        self.waited = time.perf_counter() - began
        return found

    def behind(self, before: BegunStep) -> tuple[float, float]:
        """Seconds since the one before began, and since it ended: the device was idle then."""
        start, first = self.inner.start, before.inner
        return start.since(first.start), start.since(first.arriving.end)


@dataclass
class Watched:
    """A decoder that notes when each step began and ended, its rows, and all their tokens."""

    inner: Any
    steps: list[tuple[float, float, int, int, int]]
    begun: list[BegunStep]
    prompts: list[Any]  # steps of them that were begun

    def can_begin(self, rows: int, choices: Any) -> bool:
        """As a decoder does."""
        return bool(self.inner.can_begin(rows, choices))

    def begin(self, batch: Any, choices: Any, ahead: Any) -> BegunStep:
        """As a decoder does."""
        began = time.perf_counter()
        found = self.inner.begin(batch, choices, ahead)
        held = int(batch.past_lengths.sum()) + batch.input_ids.size
        took = time.perf_counter() - began
        self.begun.append(BegunStep(found, len(batch.input_ids), held, took))
        return self.begun[-1]

    def begin_prompts(self, batch: Any) -> Any:
        """As a decoder does."""
        found = self.inner.begin_prompts(batch)
        self.prompts.append(found)
        return found

    def choose(self, batch: Any, choices: Any) -> Any:
        """As a decoder does."""
        return self._noted(lambda given: self.inner.choose(given, choices), batch)

    def step(self, batch: Any) -> Any:
        """As a decoder does."""
        return self._noted(self.inner.step, batch)

    def likeliest(self, batch: Any) -> Any:
        """As a decoder does."""
        return self._noted(self.inner.likeliest, batch)

    def _noted(self, run: Callable[[Any], Any], batch: Any) -> Any:
        began = time.perf_counter()
        found = run(batch)
        held = int(batch.past_lengths.sum()) + batch.input_ids.size
        self.steps.append((began, time.perf_counter(), *batch.input_ids.shape, held))
        return found

    def move(self, move: Any) -> None:
        """As a decoder does."""
        self.inner.move(move)


def _between(before: BegunStep, after: BegunStep, prompts: list[Any]) -> bool:
    """Whether the device ran a prompt between the two."""
    starts = (after.inner.start.since(one.start) for one in prompts)
    length, _ = after.behind(before)
    return any(0 < start < length for start in starts)


def figures(watched: Watched, batch: int, read: tuple[int, int]) -> dict[str, Any]:
    """Medians in milliseconds: of a whole step, from its beginning to the next, and inside.

    Of steps that are begun by the device's moments: `idle_ms` is between the end of one and the
    beginning of the next, `host_ms` what the host does in a step, and does not wait.
    """
    steps = watched.steps
    prefill = [end - start for start, end, _, tokens, _ in steps if tokens > 1]
    prefill += [step.seconds for step in watched.prompts]
    pairs = [(a, b) for a, b in itertools.pairwise(watched.begun) if a.rows == b.rows == batch]
    pairs = [pair for pair in pairs if not _between(*pair, watched.prompts)]
    if pairs:
        times = [b.behind(a) for a, b in pairs]
        whole = statistics.median(step for step, _ in times) * 1e3
        more = {
            "idle_ms": round(statistics.median(idle for _, idle in times) * 1e3, 4),
            "idle_share": round(sum(i for _, i in times) / sum(s for s, _ in times), 4),
            "host_ms": round(whole - statistics.median(a.waited for a, _ in pairs) * 1e3, 3),
            "begin_ms": round(statistics.median(a.begin for a, _ in pairs) * 1e3, 3),
        }
        inside = statistics.median(a.seconds for a, _ in pairs) * 1e3
        held = statistics.mean(a.held for a, _ in pairs)
    else:
        full = [(a, b) for a, b in itertools.pairwise(steps) if a[2:4] == b[2:4] == (batch, 1)]
        whole = statistics.median(b[0] - a[0] for a, b in full) * 1e3
        inside = statistics.median(a[1] - a[0] for a, _ in full) * 1e3
        held = statistics.mean(a[4] for a, _ in full)
        more = {"idle_ms": round(whole - inside, 4)}  # at least
    bytes_read = read[0] + held * read[1]
    return {
        "batch": batch,
        "context": round(held / batch),
        "step_ms": round(whole, 3),
        "decoder_ms": round(inside, 3),
        "tokens_per_s": round(batch / whole * 1e3, 1),
        "gb_per_s": round(bytes_read / whole / 1e6, 1),
        "prefill_s": round(sum(prefill), 4),
        "steps": len(pairs) or len(full),
        **more,
    }
