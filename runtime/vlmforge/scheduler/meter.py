"""Counting, without a lock that the worker would wait for.

What the worker counts is its own, and whoever reads it may see a value that is about to change.
Requests that end elsewhere, before they reached the worker, are counted apart, under a lock that
the worker never takes.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable

from msgspec import Struct, field

from vlmforge.errors import as_ours
from vlmforge.outputs.events import Event
from vlmforge.outputs.metrics import SHARES, Histogram, Tally
from vlmforge.outputs.response import Response
from vlmforge.runner.clock import PartClock

Sink = Callable[[Event], None]

ENDS = ("stop", "length", "abort", "error")


class Ends(Struct):
    """Of answers."""

    how: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(ENDS, 0)))
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    images_cached: int = 0
    requests: int = 0
    seconds: Tally = field(default_factory=Tally)

    def add(self, event: Event, seconds: float) -> None:
        """Note an event that ends an answer, so long after its request began."""
        self.requests += event.last
        self.seconds.add(seconds)
        if event.error is not None:
            self.how["error"] += 1
            self.errors[as_ours(event.error).code] += 1
        elif event.delta is not None:
            self.how[event.delta.finish_reason or "error"] += 1
            if not event.choice:  # all answers have one prompt
                self.prompt_tokens += event.delta.input_token_len
                self.cached_tokens += event.delta.cached_tokens
            self.generated_tokens += event.delta.generate_token_len
            if event.delta.timings is not None and not event.choice:
                self.images_cached += event.delta.timings.cached_images


class Meter:
    """Of one pipeline."""

    def __init__(self, parts: PartClock, clock: Callable[[], float] = time.perf_counter) -> None:
        self._parts, self._clock = parts, clock
        self._worker = 0
        self._lock = threading.Lock()  # of `_elsewhere` and `_submitted`
        self._elsewhere, self.ends = Ends(), Ends()
        self._submitted = 0
        self.steps, self.shares = Tally(), Tally(SHARES)
        self.first_token, self.between_tokens = Tally(), Tally()
        self._step_begun: float | None = None
        self._steps = 0.0  # seconds of steps that have ended

    # --- the worker --------------------------------------------------------------------------

    def begin(self) -> None:
        """This thread is the worker."""
        self._worker = threading.get_ident()

    def step(self) -> _MeteredStep:
        """For a `with` in which a step is run."""
        return _MeteredStep(self)

    def begin_step(self) -> float:
        """A step begins; what the parts have run so far."""
        self._step_begun = self._clock()
        return self._parts.seconds

    def end_step(self, parts: float) -> None:
        """The step has ended that began with so much."""
        begun, self._step_begun = self._step_begun, None
        seconds = 0.0 if begun is None else self._clock() - begun
        inside = self._parts.seconds - parts
        self._steps += seconds
        if inside:  # one that found nothing to run is none
            self.steps.add(seconds)
            self.shares.add(max(0.0, 1 - inside / seconds) if seconds else 0.0)

    # --- requests, on any thread -------------------------------------------------------------

    def watched(self, sink: Sink) -> Sink:
        """The sink of a request that begins now; its events are counted on their way."""
        watched = _Watched(self, sink, self._clock()).send
        with self._lock:
            self._submitted += 1
        return watched

    def ended(self, event: Event, seconds: float) -> None:
        """An answer has ended."""
        if threading.get_ident() == self._worker:
            self.ends.add(event, seconds)
        else:
            with self._lock:
                self._elsewhere.add(event, seconds)

    def now(self) -> tuple[float, float, float]:
        """The time; seconds of steps and inside of the engine's parts, ever."""
        now, begun = self._clock(), self._step_begun
        return now, self._steps + (0.0 if begun is None else now - begun), self._parts.seconds

    # --- whoever wants to know ---------------------------------------------------------------

    @property
    def under_way(self) -> int:
        """Requests that have not ended."""
        with self._lock:
            return self._submitted - self._elsewhere.requests - self.ends.requests

    def total(self, name: str) -> int:
        """A number of `Ends`, of all threads."""
        return int(getattr(self.ends, name) + getattr(self._elsewhere, name))

    def counted(self, name: str) -> dict[str, int]:
        """A counter of `Ends`, of all threads."""
        with self._lock:
            found = Counter(dict(getattr(self._elsewhere, name)))
        found.update(dict(getattr(self.ends, name)))  # copied at once: the worker adds to it
        return dict(found)

    def request_seconds(self) -> Histogram:
        """From requests to their ends."""
        with self._lock:
            return self.ends.seconds.plus(self._elsewhere.seconds)


class _MeteredStep:
    """No generator: it is of every step."""

    __slots__ = ("_meter", "_parts")

    def __init__(self, meter: Meter) -> None:
        self._meter, self._parts = meter, 0.0

    def __enter__(self) -> None:
        self._parts = self._meter.begin_step()

    def __exit__(self, *_: object) -> None:
        self._meter.end_step(self._parts)


class _Watched:
    """The events of one request, one at a time."""

    def __init__(self, meter: Meter, sink: Sink, begun: float) -> None:
        self._meter, self._sink = meter, sink
        self._begun = begun
        self._said: dict[int, tuple[int, float]] = {}  # tokens of each answer so far, and when
        _, self._steps, self._parts = meter.now()

    def send(self, event: Event) -> None:
        now, steps, parts = self._meter.now()
        delta = event.delta
        if delta is not None and delta.finish_reason != "abort":
            self._note(event.choice, delta.generate_token_len, now)
        ends = event.error is not None or (delta is not None and delta.finish_reason is not None)
        if ends:
            if delta is not None:
                self._share(delta, steps - self._steps, parts - self._parts)
            self._meter.ended(event, now - self._begun)
        self._sink(event)

    def _note(self, choice: int, tokens: int, now: float) -> None:
        before, last = self._said.get(choice, (0, self._begun))
        new = tokens - before
        if new <= 0:
            return
        if not before:
            self._meter.first_token.add(now - self._begun)
            new -= 1
        if new:
            self._meter.between_tokens.add((now - last) / new, new)
        self._said[choice] = tokens, now

    def _share(self, delta: Response, steps: float, parts: float) -> None:
        if delta.timings is not None and steps > 0:
            share = min(max(0.0, 1 - parts / steps), 1.0)
            delta.timings = dataclasses.replace(delta.timings, host_share=share)
