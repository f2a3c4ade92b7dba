"""Callers that send drawn requests all the time, watched by somebody who does not wait for ever."""

from __future__ import annotations

import faulthandler
import itertools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from drawn_requests import Drawing
from sent_requests import Outcome, send
from vlmforge import GenerationConfig, Pipeline

_LOOK_S = 0.5


class Callers:
    """Threads that send requests, each the next when its last has ended.

    Attributes:
        outcomes: How many prompts ended in each way.
        tokens: That were generated.
        faults: What must not be, with the number that draws the request again.
        sent: Prompts that have ended.
    """

    def __init__(self, pipe: Pipeline, drawing: Drawing, window: int, *, hangs: float) -> None:
        self._pipe, self._drawing, self._window, self._hangs = pipe, drawing, window, hangs
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._begun: dict[int, tuple[int, float]] = {}  # request and time by thread
        self.outcomes: Counter[str] = Counter()
        self.tokens, self.sent = 0, 0
        self.faults: list[str] = []

    def run(self, count: int, goes_on: Callable[[], bool]) -> None:
        """Send by `count` callers while `goes_on()`; all requests have ended when it returns.

        Ends the process with status 3 and the stacks of all threads if one never ends.
        """
        threads = [threading.Thread(target=self._call, args=(goes_on,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            # Should even this thread be stuck, by a lock that somebody holds for ever.
            faulthandler.dump_traceback_later(self._hangs + 60, exit=True)
            threads[0].join(_LOOK_S) if threads[0].is_alive() else time.sleep(_LOOK_S / 5)
            self._look_for_hangs()
        faulthandler.cancel_dump_traceback_later()

    def _call(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            number = next(self._numbers)
            self._begun[threading.get_ident()] = number, time.monotonic()
            outcomes = send(self._pipe, self._drawing.request(number), self._window)
            with self._lock:
                self._note(number, outcomes)
        self._begun.pop(threading.get_ident(), None)

    def _note(self, number: int, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self.sent += 1
            self.outcomes[outcome.end] += 1
            self.tokens += outcome.tokens
            if outcome.fault is not None:
                self.faults.append(f"request {number}: {outcome.fault}")
                print(self.faults[-1], file=sys.stderr, flush=True)

    def _look_for_hangs(self) -> None:
        now = time.monotonic()
        for number, begun in list(self._begun.values()):
            if now - begun > self._hangs:
                print(f"request {number} hangs: no end in {self._hangs:g} s", file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(3)


def settle(pipe: Pipeline, places: int) -> None:
    """Bring the cache to one state, whatever was asked before: each place has a short answer."""
    shortest = GenerationConfig(max_new_tokens=1)
    for i in range(3 * places):
        pipe(f"{i} at rest", shortest, do_preprocess=False)


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    return _rolled_up("Rss")


def of_files() -> int:
    """Resident memory of this process that is of files: the system takes it when it needs it."""
    return resident_bytes() - _rolled_up("Anonymous")


def _rolled_up(name: str) -> int:
    """To the page: `statm`, which is faster, is rough where processors are many."""
    rows = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    return int(next(row for row in rows if row.startswith(f"{name}:")).split()[1]) << 10
