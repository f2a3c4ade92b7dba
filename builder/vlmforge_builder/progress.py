"""What a build says while it works: stage, elapsed time, memory; for people and for programs."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from vlmforge.errors import VlmforgeError

HEARTBEAT_S = 5.0
_SAMPLE_S = 0.05
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this process in bytes. `anonymous` excludes mapped files, whose pages can go."""

    resident: int
    anonymous: int


def memory_now() -> Memory:
    """Read from the operating system; zeros where it does not publish them."""
    try:
        text = Path("/proc/self/status").read_text("ascii", errors="replace")
    except OSError:
        return Memory(0, 0)
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def kib(key: str) -> int:
        return int(rows.get(key, "0 kB").split()[0]) * 1024

    return Memory(kib("VmRSS"), kib("RssAnon"))


class Interrupted(KeyboardInterrupt):
    """The build was told to end, by Ctrl-C or by a polite kill.

    A class of its own: where a plain KeyboardInterrupt passes through code that C ran, Python ends
    by SIGINT afterwards, whatever status is returned.
    """


@dataclass(slots=True)
class _State:
    stage: str = ""
    done: int = 0
    total: int = 0
    peak_resident: int = 0
    peak_anonymous: int = 0
    spoken: float = 0.0
    signal: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Progress:
    """Prints stages to `text` and writes events to `events`, one JSON object a line.

    While a stage runs, a line is printed at least every 5 seconds. Use as a context manager.
    """

    def __init__(self, text: TextIO | None = None, events: TextIO | None = None) -> None:
        # None where a service has closed it; print() would then take standard output.
        self._text = sys.stderr if text is None else text
        self._events = events
        self._start = time.monotonic()
        self._state = _State()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def peak(self) -> Memory:
        """The largest figures seen, sampled 20 times a second."""
        return Memory(self._state.peak_resident, self._state.peak_anonymous)

    @property
    def signal(self) -> int | None:
        """The signal that told the build to end."""
        return self._state.signal

    def interrupt(self, signum: int) -> None:
        """End the build: for a signal's handler.

        It is remembered as well: a library can lose an exception that strikes while its C code
        calls Python.

        Raises:
            Interrupted: always.
        """
        self._state.signal = signum
        raise Interrupted(signum)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the build; says when it begins and how long it took.

        Raises:
            Interrupted: `interrupt` was called.
        """
        begin = self.elapsed
        self._state.stage, self._state.done, self._state.total = name, 0, 0
        self._say("begin", name)
        yield
        if self._state.signal is not None:
            raise Interrupted(self._state.signal)
        self._say("end", f"{name}: {self.elapsed - begin:.1f} s", seconds=self.elapsed - begin)

    def report(self, done: int, total: int) -> None:
        """Bytes of the current stage that are done; spoken by the next heartbeat."""
        self._state.done, self._state.total = done, total

    def note(self, text: str) -> None:
        """A decision or a warning that the user should see."""
        self._say("note", text)

    def fail(self, kind: str, error: VlmforgeError) -> None:
        """The error that ends the build, as an event only: for people it is printed at the end."""
        parts = {"summary": error.summary, "found": error.found}
        parts |= {"expected": error.expected, "fix": error.fix}
        self._write({"event": "error", "error": kind, **parts})

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            now, state = memory_now(), self._state
            state.peak_resident = max(state.peak_resident, now.resident)
            state.peak_anonymous = max(state.peak_anonymous, now.anonymous)
            if state.stage and self.elapsed - state.spoken >= HEARTBEAT_S - 2 * _SAMPLE_S:
                share = f" {100 * state.done // state.total}%" if state.total else ""
                try:
                    self._say("heartbeat", f"{state.stage}{share} ...")
                except OSError:
                    state.spoken = math.inf  # nobody listens; the next stage ends the build by it

    def _say(self, event: str, text: str, seconds: float | None = None) -> None:
        state = self._state
        with state.lock:
            if event == "heartbeat" and not state.stage:
                return  # it has ended at this moment
            state.spoken = now = self.elapsed
            peak = f"peak {state.peak_anonymous / _MIB:.0f} MiB"
            if self._text is not None:
                print(f"[{now:7.1f} s | {peak}] {text}", file=self._text, flush=True)
            row = {
                "event": event,
                "stage": state.stage,
                "text": text,
                "elapsed_s": round(now, 3),
                "seconds": None if seconds is None else round(seconds, 3),
                "done_bytes": state.done,
                "total_bytes": state.total,
                "peak_rss_bytes": state.peak_resident,
                "peak_anonymous_bytes": state.peak_anonymous,
            }
            self._write(row)
            if event == "end":
                state.stage = ""

    def _write(self, row: Mapping[str, object]) -> None:
        # In ASCII: the name of a file need not be text that an encoding has.
        if self._events is not None:
            print(json.dumps(row), file=self._events, flush=True)
