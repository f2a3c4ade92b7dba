"""A prepared request, as the runner takes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vlmforge.backends import FloatArray
from vlmforge.errors import as_exception
from vlmforge.features import PreparedImage
from vlmforge.prompt.render import RenderedPrompt

logger = logging.getLogger("vlmforge")


class Generation(Protocol):
    """Chooses the tokens of one sequence and hands them to its caller."""

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the logits after every token of the prompt are needed."""

    def begin(self, facts: PrefillFacts) -> None:
        """The prompt has been run."""

    def accept(self, logits: FloatArray) -> int | None:
        """Choose from logits `[vocab_size]`; the token to run next, or None at the end."""

    def fail(self, error: Exception) -> None:
        """The sequence ends with an error."""


@dataclass(frozen=True, slots=True)
class PrefillFacts:
    """What is known once a prompt has been run; times in seconds.

    `prompt_logits` is `[tokens, vocab_size]` when they were wanted. `cached_images` needed no
    encoding: their features were known, or all their tokens were in the cache.
    """

    queue: float
    encode: float
    prefill: float
    cached_tokens: int
    cached_images: int
    prompt_logits: FloatArray | None


def _nothing() -> None:
    return None


@dataclass(slots=True, eq=False)
class Job:
    """A prepared request: its prompt, its images and who chooses its tokens.

    Attributes:
        taken: Called once, when the job waits no more.
    """

    prompt: RenderedPrompt
    images: Sequence[PreparedImage]
    generation: Generation
    taken: Callable[[], None] = _nothing
    submitted: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)

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
