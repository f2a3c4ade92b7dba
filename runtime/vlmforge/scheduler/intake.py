"""Requests on their way to the worker: prepared by a few threads, and only a few ahead of it.

Images are loaded here, not by callers: a request can be cancelled while that goes on, an event loop
is never held up, and what waits for the worker with its pixels in memory is bounded. Prompts of
text alone have threads of their own, so that they never wait for somebody's images.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from typing_extensions import override

from vlmforge.errors import PipelineError, as_ours
from vlmforge.runner.job import Job
from vlmforge.scheduler import lifetime
from vlmforge.scheduler.loop import Loop, closed
from vlmforge.scheduler.request import Request, cancelled

_TEXT_THREADS = 2
_IMAGE_THREADS = 8

Prepare = Callable[[Request], Job]


class Intake:
    """Takes requests and sees to it that each of them ends.

    Args:
        prepare: Makes a request's job; its errors end the request.
        loop: Runs the jobs.
        ahead: Requests with images that may be prepared, or being prepared, before they run; and
            as many without.
    """

    def __init__(self, prepare: Prepare, loop: Loop, *, ahead: int) -> None:
        self._loop = loop
        self._texts, self._images = (
            Lane(prepare, loop, threads=min(threads, ahead), ahead=ahead)
            for threads in (_TEXT_THREADS, _IMAGE_THREADS)
        )

    def submit(self, request: Request) -> None:
        """Begin a request; never waits. Once begun, its sink gets an event that ends it.

        Raises:
            PipelineError, CancelledError: see `Loop.check`.
        """
        self._loop.check()
        request.watch.switch("queue")
        self._lane(request).put(request)

    def cancel(self, request: Request) -> None:
        """End a request: at once, or with what it has at the worker's next step."""
        if self._loop.forked or request.ended:
            return
        request.cancelled.set()
        self._lane(request).discard(request)
        if not request.begun:
            request.fail(cancelled())
        self._loop.wake()

    def close(self) -> None:
        """End every request, and the worker. May be called more than once."""
        if self._loop.forked:
            return
        for lane in (self._texts, self._images):
            lane.close()
        self._loop.close()

    def stop(self) -> None:
        """As `close`, for nobody who waits: takes no lock and waits for nothing."""
        for lane in (self._texts, self._images):
            lane.stop()
        self._loop.stop()

    def _lane(self, request: Request) -> Lane:
        return self._images if request.conversation.images else self._texts


class Lane(lifetime.Owner):
    """A queue of requests, and the threads that prepare them; see `Intake`."""

    def __init__(self, prepare: Prepare, loop: Loop, *, threads: int, ahead: int) -> None:
        self._prepare, self._loop = prepare, loop
        self._most_threads, self._places = threads, ahead
        self._lock = threading.RLock()  # a signal's handler may close what its thread is using
        self._waiting: deque[Request] = deque()
        self._preparing: set[Request] = set()
        self._todo: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False
        lifetime.watch(self)

    def put(self, request: Request) -> None:
        """Queue a request (CancelledError once the lane is closed)."""
        self._enqueue(request)
        if self._closed:  # meanwhile, and whoever did it may not have seen the request
            request.fail(closed())

    def discard(self, request: Request) -> None:
        """Forget a request that waits here. Takes no lock, for a garbage collector's sake."""
        with suppress(ValueError):
            self._waiting.remove(request)

    def close(self) -> None:
        """End every request that has not reached the worker, and the threads when they can."""
        with self._lock:
            self._closed = True
            left = [*self._waiting, *self._preparing]
            self._waiting.clear()
        self.stop()
        for request in left:
            request.fail(closed())
            request.cancelled.set()

    def stop(self) -> None:
        """End the threads when they can; takes no lock."""
        self._closed = True
        self._todo.put(None)

    @override
    def end(self) -> None:
        self.close()
        for thread in self._threads:
            thread.join()

    @override
    def abandon(self) -> None:
        """The loop refuses whoever comes."""

    def _enqueue(self, request: Request) -> None:
        with self._lock:
            if self._closed:
                raise closed()
            self._provide_thread()
            self._waiting.append(request)
            self._advance()

    def _provide_thread(self) -> None:
        busy = len(self._preparing) + len(self._waiting)
        if busy < len(self._threads) or len(self._threads) == self._most_threads:
            return
        thread = threading.Thread(target=self._serve, name="vlmforge-prepare", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if self._threads:
                return  # fewer will do
            raise PipelineError(
                "No thread could be started to prepare a request.",
                found=str(error),
                expected="a process that may start threads, and is not ending",
                fix="raise the limit of processes (ulimit -u), or end other threads",
            ) from error
        self._threads.append(thread)

    def _advance(self) -> None:
        while self._waiting and self._places:
            try:
                request = self._waiting.popleft()
            except IndexError:  # it was discarded at this moment
                return
            self._places -= 1
            self._preparing.add(request)
            self._todo.put(request)

    def _serve(self) -> None:
        while self._serve_one(self._todo.get()):
            pass
        self._todo.put(None)  # for the next thread

    def _serve_one(self, request: Request | None) -> bool:
        if request is None:
            return False
        handed = False
        try:
            if not (request.ended or self._closed):
                job = self._prepare(request)
                job.taken = self._give_place
                self._loop.submit(job)
                handed = True
        except BaseException as error:  # noqa: BLE001 - ends this request, whatever it is
            request.fail(as_ours(error))
        with self._lock:
            self._preparing.discard(request)
        if not handed:
            request.fail(closed())  # unless it has ended
            self._give_place()
        return True

    def _give_place(self) -> None:
        with self._lock:
            self._places += 1
            self._advance()
