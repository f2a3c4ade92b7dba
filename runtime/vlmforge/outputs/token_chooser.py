"""Who chooses a sequence's tokens, as the runner sees it."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from vlmforge.backends import FloatArray
from vlmforge.backends.choice import Choice, Found


class TokenChooser(Protocol):
    """Chooses the tokens of one sequence and hands them to its caller."""

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the logits after every token of the prompt are needed."""

    def begin(self, facts: PrefillFacts) -> None:
        """The prompt has been run."""

    @property
    def left(self) -> int:
        """Tokens that may still be chosen; the last of them ends the sequence."""

    def choice(self, ahead: int = 0) -> Choice | None:
        """How the next token is chosen, for who has the logits; None: they are wanted here.

        `ahead` tokens come before it that are not known yet; None too if it depends on them.
        """

    def accept(self, found: Found) -> int | None:
        """Choose from logits `[vocab_size]`; the token to run next, or None at the end.

        The largest one's id will do for one that always takes the likeliest (-1: not finite), and
        the token itself for one that gave its `choice` for this step.
        """

    def fail(self, error: Exception) -> None:
        """The sequence ends with an error."""


class PrefillFacts(Struct, frozen=True):
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
