"""A request, and what one step does for it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vlmforge.kv.cache import Keys


class State(enum.Enum):
    """Where a request is: it begins WAITING, and may go back to it when room is short."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Request:
    """All that changes about a request, in one place.

    Attributes:
        id: Unique in its scheduler.
        tokens: Ids of the prompt and, behind them, of what was generated; an id >= vocab_size is a
            row of the images' features.
        keys: int64, what identifies each token's content (see `kv.cache`).
        salt: Requests with another salt share nothing in the cache.
        priority: Higher goes first.
        fresh: The whole prompt is run, because the logits after each of its tokens are wanted.
        computed: Tokens whose keys and values are in the cache.
        cached: Tokens that were there when it was admitted (last).
        prompt_length: Tokens of the prompt.
        preempted: How often it has lost its place.
    """

    id: int
    tokens: list[int]
    keys: Keys
    salt: bytes = b""
    priority: int = 0
    fresh: bool = False
    state: State = State.WAITING
    computed: int = 0
    cached: int = 0
    preempted: int = 0
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def decoding(self) -> bool:
        """Whether nothing but its newest token is left to run."""
        return self.computed == len(self.tokens) - 1 and self.computed >= self.prompt_length

    def append(self, token: int) -> None:
        """A token was generated."""
        self.tokens.append(token)
        self.keys = np.append(self.keys, np.int64(token))


Logits = Literal["none", "last", "all"]


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens `start .. stop` of a request are run; `logits` says after which they are wanted."""

    request: int
    start: int
    stop: int
    logits: Logits


@dataclass(frozen=True, slots=True)
class Step:
    """What is done next: a part of a prompt, if any, and one token of each that decodes."""

    prefill: Row | None
    decode: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them."""
        return (*((self.prefill,) if self.prefill else ()), *self.decode)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step.

    Attributes:
        tokens: The next token by request, or None where the answer is complete. Requests whose row
            wanted no logits are not in it.
        failed: Requests whose row was not run, or whose answer ended with an error; what their
            rows wrote is unknown.
    """

    tokens: dict[int, int | None]
    failed: Sequence[int] = ()
