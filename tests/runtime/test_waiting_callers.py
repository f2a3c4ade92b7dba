"""A caller whose thread waits for events: a few looks first, then until they come."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest

from vlmforge.api import calls
from vlmforge.api.calls import Call
from vlmforge.outputs.events import Event


class Noted(queue.SimpleQueue[list[Event]]):
    """Attributes: how long each look would wait; None: until something comes."""

    def __init__(self, empty: int) -> None:
        super().__init__()
        self.waits: list[float | None] = []
        self._empty = empty

    def get(self, block: bool = True, timeout: float | None = None) -> list[Event]:
        self.waits.append(timeout)
        if len(self.waits) <= self._empty:
            raise queue.Empty
        return super().get(block, timeout)


def waiting(events: Noted, *, over: bool = False, left: float | None = None) -> Call:
    expired: list[object] = []
    terms: Any = SimpleNamespace(over=over, left=left)
    loop: Any = SimpleNamespace(check_process=lambda: None)
    intake: Any = SimpleNamespace(expire=expired.append)
    call = Call(intake, loop, terms, True, 1, events)
    call._requests[0] = "asked"  # type: ignore[assignment]
    events.put([Event(0, last=True)])
    return call


@pytest.mark.parametrize("empty", range(len(calls._LOOKS) + 1))
def test_it_looks_a_few_times_and_then_waits(empty: int) -> None:
    events = Noted(empty)
    assert waiting(events)._next() == [Event(0, last=True)]
    assert events.waits == [*calls._LOOKS, None][: empty + 1]
    assert sum(calls._LOOKS) < 0.02


def test_whose_time_is_over_does_not_look() -> None:
    events = Noted(1)
    call = waiting(events, over=True, left=0.0)
    assert call._next() == [Event(0, last=True)]
    assert events.waits == [0.0, None]  # and what has expired is told of then
