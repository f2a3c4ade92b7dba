"""Events for an event loop from other threads: none is lost, and many wake it once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from vlmforge.api.letters import Letters, letters_to
from vlmforge.outputs.events import Event


class Loop:
    """Notes what it is asked to call; closed, it refuses."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], None]] = []
        self.closed = False

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.asked.append(call)

    def is_closed(self) -> bool:
        return self.closed


def test_many_events_wake_the_loop_once() -> None:
    loop, queues = Loop(), [asyncio.Queue[Event](), asyncio.Queue[Event]()]
    letters = Letters(cast(Any, loop))
    for number in range(6):
        letters.post(queues[number % 2], Event(number))
    assert len(loop.asked) == 1
    loop.asked.pop()()
    assert [queues[0].get_nowait().index for _ in range(3)] == [0, 2, 4]
    assert [queues[1].get_nowait().index for _ in range(3)] == [1, 3, 5]
    letters.post(queues[0], Event(7))
    assert len(loop.asked) == 1  # it wakes again


def test_who_posts_to_a_loop_that_is_gone_hears_of_it_each_time() -> None:
    loop = Loop()
    letters = Letters(cast(Any, loop))
    loop.closed = True
    for number in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            letters.post(asyncio.Queue(), Event(number))


def test_a_loop_that_goes_before_it_was_woken_is_noticed() -> None:
    loop = Loop()
    letters = Letters(cast(Any, loop))
    letters.post(asyncio.Queue(), Event(0))
    loop.closed = True
    with pytest.raises(RuntimeError, match="closed"):
        letters.post(asyncio.Queue(), Event(1))


def test_no_event_is_lost_between_threads() -> None:
    async def run() -> list[int]:
        queue, letters = asyncio.Queue[Event](), letters_to(asyncio.get_running_loop())
        assert letters_to(asyncio.get_running_loop()) is letters

        def post(start: int) -> None:
            for number in range(500):
                letters.post(queue, Event(start + number))

        threads = [threading.Thread(target=post, args=(1000 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        return [(await queue.get()).index for _ in range(2000)]

    found = asyncio.run(run())
    for start in range(0, 4000, 1000):  # each thread's in its order
        mine = [number for number in found if start <= number < start + 1000]
        assert mine == list(range(start, start + 500))
