"""Events on their way from the worker's thread to an event loop."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

from vlmforge.outputs.events import Event

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Queue


class Letters:
    """Takes events for the queues of one event loop; many of them wake it once.

    A step of the engine has an event for each of its sequences: to wake the loop for every one
    would be a system call each.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = loop
        self._held: deque[tuple[Queue[Event], Event]] = deque()
        self._called = False

    def post(self, queue: Queue[Event], event: Event) -> None:
        """Put the event into the queue, from any thread (RuntimeError: the loop is closed)."""
        self._held.append((queue, event))
        # Whoever comes for the others has not looked yet, and finds this too; unless the loop was
        # closed meanwhile, with which what it was called for is forgotten.
        if self._called and not self._loop.is_closed():
            return
        self._called = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            self._called = False
            self._held.clear()
            raise

    def _deliver(self) -> None:
        self._called = False  # first: what is posted from here on is found, or calls again
        while self._held:
            queue, event = self._held.popleft()
            queue.put_nowait(event)


# By their loops; they are there as long as a call uses them.
_LETTERS: weakref.WeakValueDictionary[AbstractEventLoop, Letters] = weakref.WeakValueDictionary()


def letters_to(loop: AbstractEventLoop) -> Letters:
    """Those of the running loop, which all its calls share."""
    found = _LETTERS.get(loop)
    if found is None:
        found = _LETTERS[loop] = Letters(loop)
    return found
