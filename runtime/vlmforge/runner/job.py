"""A prepared request, as the runner takes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from msgspec import Struct, field

from vlmforge.errors import as_exception
from vlmforge.inputs.render import RenderedPrompt
from vlmforge.outputs.token_chooser import TokenChooser
from vlmforge.runner.terms import USUAL, Terms
from vlmforge.vl.prepared import PreparedImage

logger = logging.getLogger("vlmforge")


def _nothing() -> None:
    return None


class Job(Struct, eq=False):
    """A prepared request: its prompt, its images and who chooses its tokens.

    Attributes:
        siblings: Of other answers to the same prompt, which is run once; they need no images.
        terms: Its turn, its salt and its time.
        likeliest: Whether `generation` always takes the likeliest token, and needs nothing else of
            the logits.
        taken: Called once, when the job waits no more.
    """

    prompt: RenderedPrompt
    images: Sequence[PreparedImage]
    generation: TokenChooser
    siblings: Sequence[Job] = ()
    terms: Terms = USUAL
    taken: Callable[[], None] = _nothing
    submitted: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)
    likeliest: bool = False

    def fail(self, error: BaseException) -> None:
        """Tell the caller; where that fails too, the others go on."""
        try:
            self.generation.fail(as_exception(error))
        except BaseException:
            logger.critical("the end of a request could not be reported: %s", error, exc_info=True)

    def let_go(self) -> None:
        """The job waits no more."""
        taken, self.taken = self.taken, _nothing
        try:
            taken()
        except BaseException:  # the others go on
            logger.critical("a place in the queue was lost", exc_info=True)
