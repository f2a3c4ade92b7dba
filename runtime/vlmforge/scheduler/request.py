"""A request: one prompt, from the moment that it is asked for to the event that ends it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from msgspec import Struct, field

from vlmforge.errors import CancelledError, RequestTimeoutError, as_exception
from vlmforge.inputs.messages import Conversation
from vlmforge.outputs.events import Event
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.outputs.response import Response, Stopwatch
from vlmforge.runner.terms import USUAL, Terms

logger = logging.getLogger("vlmforge")


class Request(Struct, eq=False):
    """Exists, and can be cancelled, before anything is done for it.

    Attributes:
        conversation: What is asked; its images need not be loaded.
        config: How to generate.
        sink: Gets its events, from whichever thread has them; must not block. The last one comes
            exactly once, and nothing after it.
        index: Its place in the call.
        do_preprocess: False sends text verbatim.
        watch: Has been running since the request was made.
        terms: Its turn, its salt and its time.
        cancelled: Nobody wants it any more.
        answers: To its prompt; it ends when all of them have.
    """

    conversation: Conversation
    config: GenerationConfig
    sink: Callable[[Event], None]
    index: int = 0
    do_preprocess: bool = True
    watch: Stopwatch = field(default_factory=Stopwatch)
    terms: Terms = USUAL
    cancelled: threading.Event = field(default_factory=threading.Event)
    answers: tuple[Answer, ...] = ()
    # A garbage collector may cancel a request whose thread is just sending.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.answers = (Answer(self, 0, self.watch),)

    @property
    def begun(self) -> bool:
        """The worker generates its answers: cancelled, they end with what they have."""
        return any(answer.begun for answer in self.answers)

    @property
    def ended(self) -> bool:
        """Whether its last event has been sent."""
        return all(answer.ended for answer in self.answers)

    def expect(self, answers: int) -> tuple[Answer, ...]:
        """From now on there are so many answers, none of them begun; each has a watch."""
        with self._lock:
            more = (Answer(self, i, self.watch.copy()) for i in range(1, answers))
            if not self.ended:
                self.answers = (*self.answers[:1], *more)
        return self.answers

    def fail(self, error: BaseException) -> None:
        """End the request, what is left of it, with an error."""
        for answer in self.answers:
            try:
                answer.send(None, as_exception(error))
            except BaseException:  # its caller can be told no more; the others go on
                logger.critical(
                    "the end of a request could not be reported: %s", error, exc_info=True
                )

    def check(self) -> None:
        """CancelledError when nobody wants it any more."""
        if self.cancelled.is_set():
            raise cancelled()

    def send(self, answer: Answer, delta: Response | None, error: Exception | None) -> None:
        """Hand an event of an answer to the caller; nothing once that has ended.

        An error before any answer has begun is that of all, and so is the end of its time. A
        request that was cancelled before
        it began ends as those that had: with "abort".
        """
        with self._lock:
            late = isinstance(error, RequestTimeoutError)
            whole = len(self.answers) == 1 or not self.begun or late
            for receiver in self.answers if error is not None and whole else (answer,):
                if isinstance(error, CancelledError) and self.cancelled.is_set():
                    self._send(receiver, self._abort(receiver.choice), None, whole)
                else:
                    self._send(receiver, delta, error, whole)

    def _send(
        self, answer: Answer, delta: Response | None, error: Exception | None, whole: bool
    ) -> None:
        if answer.ended:
            return
        ends = error is not None or (delta is not None and delta.finish_reason is not None)
        last = ends and all(other.ended for other in self.answers if other is not answer)
        self.sink(Event(self.index, delta, error, answer.choice, whole, last))
        if ends:
            answer.end()

    def _abort(self, choice: int) -> Response:
        return Response(
            session_id=self.index, index=self.index, choice=choice, finish_reason="abort"
        )


class Answer(Struct, eq=False):
    """One of the answers to a request's prompt: a `Caller`.

    Once it has ended it lets its request go, which has it: no collector need look for the two, and
    for the pictures that were asked about.
    """

    request: Request | None
    choice: int
    watch: Stopwatch
    begun: bool = False
    index: int = 0

    def __post_init__(self) -> None:
        self.index = 0 if self.request is None else self.request.index

    @property
    def ended(self) -> bool:
        """Whether its last event has been sent."""
        return self.request is None

    def end(self) -> None:
        """Its last event has been sent."""
        self.request = None

    def send(self, delta: Response | None, error: Exception | None) -> None:
        """See `Caller`."""
        if (request := self.request) is not None:
            request.send(self, delta, error)


def cancelled() -> CancelledError:
    """What a cancelled request ends with."""
    return CancelledError("The request was cancelled.", fix="send it again")
