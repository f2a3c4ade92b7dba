"""A request: one prompt, from the moment that it is asked for to the event that ends it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from vlmforge.errors import CancelledError, as_exception
from vlmforge.inputs.messages import Conversation
from vlmforge.outputs.events import Event
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.outputs.response import Response, Stopwatch

logger = logging.getLogger("vlmforge")


@dataclass(slots=True, eq=False)
class Request:
    """Exists, and can be cancelled, before anything is done for it.

    Attributes:
        conversation: What is asked; its images need not be loaded.
        config: How to generate.
        sink: Gets its events, from whichever thread has them; must not block. The last one comes
            exactly once, and nothing after it.
        index: Its place in the call.
        do_preprocess: False sends text verbatim.
        watch: Has been running since the request was made.
        cancelled: Nobody wants it any more.
        begun: The worker generates its answer: cancelled, it ends with what it has.
    """

    conversation: Conversation
    config: GenerationConfig
    sink: Callable[[Event], None]
    index: int = 0
    do_preprocess: bool = True
    watch: Stopwatch = field(default_factory=Stopwatch)
    cancelled: threading.Event = field(default_factory=threading.Event)
    begun: bool = False
    ended: bool = False
    # A garbage collector may cancel a request whose thread is just sending.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def send(self, delta: Response | None, error: Exception | None) -> None:
        """Hand an event to the caller; nothing once the request has ended.

        A request that was cancelled before it began ends as those that had: with "abort".
        """
        if isinstance(error, CancelledError) and self.cancelled.is_set():
            abort = Response(session_id=self.index, index=self.index, finish_reason="abort")
            delta, error = abort, None
        event = Event(self.index, delta, error)
        with self._lock:
            if not self.ended:
                self.sink(event)
                self.ended = event.last

    def fail(self, error: BaseException) -> None:
        """End the request with an error, unless it has ended."""
        try:
            self.send(None, as_exception(error))
        except BaseException:  # its caller can be told no more; the others go on
            logger.critical("the end of a request could not be reported: %s", error, exc_info=True)

    def check(self) -> None:
        """CancelledError when nobody wants it any more."""
        if self.cancelled.is_set():
            raise cancelled()


def cancelled() -> CancelledError:
    """What a cancelled request ends with."""
    return CancelledError("The request was cancelled.", fix="send it again")
