"""What all calls do: prompts go in as the engine can take them, events come out."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from vlmforge.api.letters import letters_to
from vlmforge.errors import VlmforgeError
from vlmforge.inputs.messages import Conversation
from vlmforge.outputs.events import Event
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.runner.terms import Terms
from vlmforge.scheduler.intake import Intake
from vlmforge.scheduler.loop import Loop
from vlmforge.scheduler.request import Request

if TYPE_CHECKING:
    from tqdm import tqdm


_LOOKS = (0.0004, 0.001, 0.002)  # seconds between the first looks of a caller that waits


def terms_of(priority: int, salt: str, timeout: float | None) -> Terms:
    """The terms of a call that begins now; `timeout` is in seconds."""
    # Behind whatever else the cache's salt is made of.
    given = b"\0" + salt.encode("utf-8", "surrogatepass") if salt else b""
    if timeout is None or timeout >= threading.TIMEOUT_MAX:  # 292 years
        return Terms(int(priority), given)
    return Terms(int(priority), given, float(timeout), time.monotonic() + float(timeout))


def progress(count: int | None) -> tqdm[Any]:
    """A bar of prompts on standard error; `count=None` where nobody knows how many there are."""
    from tqdm import tqdm  # not at the top: few ask for it

    return tqdm(total=count, unit="prompt", file=sys.stderr, dynamic_ncols=True)


class Call(Struct):
    """A call that has begun.

    Attributes:
        intake: Takes its requests.
        loop: Answers them.
        terms: Of all of them.
        do_preprocess: False sends texts verbatim.
        ahead: Requests that are under way at once.
    """

    intake: Intake
    loop: Loop
    terms: Terms
    do_preprocess: bool
    ahead: int
    _events: queue.SimpleQueue[list[Event]] = field(default_factory=queue.SimpleQueue)
    _requests: dict[int, Request] = field(default_factory=dict)
    _wants_room: bool = False  # in the queue, for the next item; any piece may bring it

    def events(
        self,
        items: Iterable[Conversation | Exception],
        configs: Iterable[GenerationConfig],
        *,
        together: bool = False,
    ) -> Generator[Event, None, None]:
        """Events of all items as they come, for a caller whose thread waits.

        `together`: those of an item come with its last one. Who is not woken for each piece does
        not take the interpreter from the worker, which has the next step to begin.

        No more items are under way than the engine can take soon, and while the queue is full only
        one waits in it: a long list of images needs no more memory than a short one. An abandoned
        iterator cancels its requests.
        """
        self.loop.check()
        asked = enumerate(zip(items, configs, strict=False))
        count = len(items) if isinstance(items, tuple) else None  # an iterator does not tell
        more = True
        try:
            while more or self._requests:
                while more and self._may_ask():
                    more = yield from self._ask(asked, count, together)
                self._wants_room = more and len(self._requests) < self.ahead
                if self._requests:
                    yield from self._next()
        finally:
            for request in self._requests.values():
                self.intake.cancel(request)

    @contextmanager
    def in_event_loop(
        self, conversation: Conversation, config: GenerationConfig
    ) -> Iterator[tuple[Request, Callable[[], Awaitable[Event]]]]:
        """A request, to be submitted, and what gives its next event to a running event loop."""
        import asyncio  # not at the top: it would be a sixth of the time of `import vlmforge`

        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        letters, cancelled = letters_to(loop), threading.Event()

        def sink(event: Event) -> None:
            try:
                letters.post(events, event)
            except RuntimeError:  # the loop is gone, and with it who would read this
                cancelled.set()

        request = self._request(conversation, config, sink)
        request.cancelled = cancelled
        left = self.terms.left
        timer = None if left is None else loop.call_later(left, self.intake.expire, request)
        try:
            yield request, events.get
        finally:
            if timer is not None:
                timer.cancel()

    def _request(
        self,
        conversation: Conversation,
        config: GenerationConfig,
        sink: Callable[[Event], None],
        index: int = 0,
    ) -> Request:
        return Request(conversation, config, sink, index, self.do_preprocess, terms=self.terms)

    def _may_ask(self) -> bool:
        count = len(self._requests)
        return not count or (count < self.ahead and not self.intake.full)

    def _ask(
        self,
        asked: Iterator[tuple[int, tuple[Conversation | Exception, GenerationConfig]]],
        count: int | None,
        together: bool,
    ) -> Generator[Event, None, bool]:
        """Submit the next item, of so many; False when there are no more.

        What fails at once is its event. Behind the last one nothing is left to do but to wait: the
        worker, which is just waking up, needs this thread's lock of the interpreter.
        """
        found = next(asked, None)
        if found is None:
            return False
        index, (item, config) = found
        try:
            if isinstance(item, Exception):
                raise item
            if self.terms.over:
                raise self.terms.timed_out()
            sink = self._sink(together)
            self._requests[index] = request = self._request(item, config, sink, index)
            self.intake.submit(request, here=True)
        except VlmforgeError as error:
            self._requests.pop(index, None)
            yield Event(index, error=error)
        return index + 1 != count

    def _sink(self, together: bool) -> Callable[[Event], None]:
        """Of one request."""
        put = self._events.put
        if not together:
            return lambda event: put([event])
        events: list[Event] = []

        def sink(event: Event) -> None:
            events.append(event)
            if event.last or self._wants_room:
                put(events.copy())
                events.clear()

        return sink

    def _soon(self) -> list[Event] | None:
        """The next events, if they come within some milliseconds.

        Whoever falls asleep leaves a processor, and Linux looks then for what waits for another
        one: a thread of the decoder's that was woken on the processor of one that waits for it
        would stay there for a tick of the clock, if this one slept all the while.
        """
        for pause in _LOOKS:
            if self.terms.over:
                break
            with suppress(queue.Empty):
                return self._events.get(timeout=pause)
        return None

    def _next(self) -> list[Event]:
        """The next events; a process that was forked while one was awaited gets no more of them."""
        self.loop.check_process()
        events = self._soon()
        if events is None:
            try:
                events = self._events.get(timeout=self.terms.left)
            except queue.Empty:
                for request in self._requests.values():
                    self.intake.expire(request)
                events = self._events.get()
        if events[-1].last:
            del self._requests[events[-1].index]
        return events
