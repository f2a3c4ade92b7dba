"""Requests on their way to the worker: prepared by a few threads, and only a few ahead of it.

Images are loaded here, not by callers: a request can be cancelled while that goes on, an event loop
is never held up, and what waits for the worker with its pixels in memory is bounded. Prompts of
text alone have threads of their own, so that they never wait for somebody's images; a caller who
waits for the answer anyway prepares them itself, which saves a change of threads.
"""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from typing_extensions import override

from vlmforge import lifetime
from vlmforge.errors import PipelineError, QueueFullError, as_ours
from vlmforge.inputs.tokenizer_file import raise_unless_fault
from vlmforge.runner.job import Job
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
            as many without. Of a higher priority, as many more.
        most: Requests that may wait.
    """

    def __init__(self, prepare: Prepare, loop: Loop, *, ahead: int, most: int) -> None:
        self._loop, self._most = loop, most
        self._lock = threading.RLock()
        self._texts, self._images = (
            Lane(prepare, loop, threads=min(threads, ahead), ahead=ahead)
            for threads in (_TEXT_THREADS, _IMAGE_THREADS)
        )

    @property
    def waiting(self) -> int:
        """Requests that have been submitted and do not run yet."""
        return self._texts.waiting + self._images.waiting

    @property
    def full(self) -> bool:
        """Whether as many requests wait as may."""
        return self.waiting >= self._most

    def submit(self, request: Request, *, refuse: bool = False, here: bool = False) -> None:
        """Begin a request; never waits. Once begun, its sink gets an event that ends it.

        Args:
            request: New.
            refuse: Whether to refuse it when the queue is full. A caller whose thread waits for
                its answer is not refused: it sends no more meanwhile.
            here: Whether this thread may prepare it, where that takes no files and nobody is ahead.

        Raises:
            QueueFullError: as many wait as may, see `refuse`.
            PipelineError, CancelledError: see `Loop.check`.
        """
        self._loop.check()
        lane = self._lane(request)
        try:
            with self._lock:  # two that come at once may find one place
                if refuse and self.full:
                    raise _full(self.waiting, self._most)
                request.sink = self._loop.meter.watched(request.sink)
                request.watch.switch("queue")
                here = here and lane is self._texts and lane.put_here(request)
                if not here:
                    lane.put(request)
            if here:
                lane.serve_here(request)
        except BaseException:  # Ctrl-C too, which comes between any two lines
            lane.give_place(request)
            raise

    def cancel(self, request: Request) -> None:
        """End a request: at once, or with what it has at the worker's next step."""
        if self._loop.forked or request.ended:
            return
        self._stop(request)
        if not request.begun:
            request.fail(cancelled())
        self._loop.wake()

    def expire(self, request: Request) -> None:
        """End a request whose time is over; its work stops at the worker's next step."""
        if not request.ended:
            request.fail(request.terms.timed_out())
            self._stop(request)
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

    def _stop(self, request: Request) -> None:
        request.cancelled.set()
        self._lane(request).discard(request)

    def _lane(self, request: Request) -> Lane:
        return self._images if request.conversation.images else self._texts


class Lane(lifetime.Owner):
    """A queue of requests, and the threads that prepare them; see `Intake`."""

    def __init__(self, prepare: Prepare, loop: Loop, *, threads: int, ahead: int) -> None:
        self._prepare, self._loop = prepare, loop
        self._most_threads, self._ahead = threads, ahead
        self._held: dict[Request, int] = {}  # who has a place, and its priority
        self._lock = threading.RLock()  # a signal's handler may close what its thread is using
        self._waiting: dict[int, deque[Request]] = {}  # by priority
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

    def put_here(self, request: Request) -> bool:
        """Whether nobody is ahead of a request, and it has a place: `serve_here` comes next."""
        with self._lock:
            ahead = self._waiting or self._preparing or len(self._held) >= self._ahead
            if self._closed or ahead:
                return False
            self._held[request] = request.terms.priority
            self._preparing.add(request)
            return True

    def serve_here(self, request: Request) -> None:
        """Prepare a request on the caller's thread; what interrupts that one is raised in it."""
        self.serve_one(request, raise_unless_fault)

    @property
    def waiting(self) -> int:
        """Requests that are here, or prepared and not taken yet."""
        with self._lock:
            return sum(map(len, list(self._waiting.values()))) + len(self._held)

    def discard(self, request: Request) -> None:
        """Forget a request that waits here. Takes no lock, for a garbage collector's sake."""
        with suppress(KeyError, ValueError):
            self._waiting[request.terms.priority].remove(request)

    def close(self) -> None:
        """End every request that has not reached the worker, and the threads when they can."""
        with self._lock:
            self._closed = True
            left = [*itertools.chain(*list(self._waiting.values())), *self._preparing]
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
            self._waiting.setdefault(request.terms.priority, deque()).append(request)
            self._advance()

    def _provide_thread(self) -> None:
        busy = len(self._preparing) + sum(map(len, list(self._waiting.values())))
        if busy < len(self._threads) or len(self._threads) == self._most_threads:
            return
        given = weakref.ref(self), self._todo
        thread = threading.Thread(target=_serve, args=given, name="vlmforge-prepare", daemon=True)
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
        """Give places, to higher priorities first; those of lower ones do not keep them out."""
        for priority in sorted(self._waiting, reverse=True):
            waiting = self._waiting.get(priority, deque())  # closed at this moment: none
            held = sum(other >= priority for other in list(self._held.values()))
            while waiting and held < self._ahead:
                try:
                    request = waiting.popleft()
                except IndexError:  # it was discarded at this moment
                    break
                held += 1
                self._held[request] = priority
                self._preparing.add(request)
                self._todo.put(request)
            if not waiting:
                self._waiting.pop(priority, None)

    def serve_one(
        self, request: Request, judge: Callable[[BaseException], None] = lambda _: None
    ) -> None:
        """Prepare a request and hand it over; `judge` may raise what it ended with instead."""
        handed = False
        try:
            if not (request.ended or self._closed):
                job = self._prepare(request)
                job.taken = functools.partial(self.give_place, request)
                self._prepared(request)  # the worker may close the lane before the next line ends
                self._loop.submit(job)
                handed = True
        except BaseException as error:  # noqa: BLE001 - ends this request, whatever it is
            request.fail(as_ours(error))
            judge(error)
        finally:
            if not handed:
                self._prepared(request)
                request.fail(closed())  # unless it has ended
                self.give_place(request)

    def _prepared(self, request: Request) -> None:
        with self._lock:
            self._preparing.discard(request)

    def give_place(self, request: Request) -> None:
        """A request needs its place no more, if it has one: the next one gets it."""
        with self._lock:
            self._preparing.discard(request)
            if self._held.pop(request, None) is not None:
                self._advance()


def _serve(lane: weakref.ref[Lane], todo: queue.SimpleQueue[Request | None]) -> None:
    """A thread of a lane, which holds nothing while it waits, neither the lane nor a request.

    It may end late: who has closed a pipeline, and lets it go, has its engine's memory back then.
    """
    while _serve_next(lane, todo):
        pass
    todo.put(None)  # for the next thread


def _serve_next(lane: weakref.ref[Lane], todo: queue.SimpleQueue[Request | None]) -> bool:
    if (request := todo.get()) is None:
        return False
    if (found := lane()) is None:
        request.fail(closed())
    else:
        found.serve_one(request)
    return True


def _full(found: int, most: int) -> QueueFullError:
    return QueueFullError(
        "The pipeline has as many requests waiting as it may.",
        found=f"{found} requests that wait",
        expected=f"at most {most}",
        fix="send it again when others have ended, or from several machines; "
        "EngineConfig(max_queued_requests=...) lets more wait",
    )
