"""A sequence of tokens that is being run, and what one step does for it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vlmforge.kv.cache import Keys, Move


class State(enum.Enum):
    """Where a sequence is: it begins WAITING, and may go back to it when room is short."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class TokenSequence:
    """All that changes about the tokens of a request, in one place.

    Attributes:
        id: Unique in its scheduler.
        tokens: Ids of the prompt and, behind them, of what was generated; an id >= vocab_size is a
            row of the images' features.
        keys: int64, what identifies each token's content (see `kv.cache`).
        salt: Sequences with another salt share nothing in the cache.
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
    def begun(self) -> bool:
        """Whether a token of the answer is there."""
        return len(self.tokens) > self.prompt_length

    @property
    def decoding(self) -> bool:
        """Whether nothing but its newest token is left to run."""
        return self.begun and self.computed == len(self.tokens) - 1

    def append(self, token: int) -> None:
        """A token was generated."""
        self.tokens.append(token)
        self.keys = np.append(self.keys, np.int64(token))


Logits = Literal["none", "last", "all"]


@dataclass(frozen=True, slots=True)
class Row:
    """What a step runs of one sequence.

    Attributes:
        sequence: Its id.
        tokens: Their ids; an id >= vocab_size is a row of the images' features.
        start: Tokens of the sequence that come before them.
        place: Where the cache has it (see `KVCache.place`).
        logits: After which of the tokens they are wanted.
    """

    sequence: int
    tokens: tuple[int, ...]
    start: int
    place: tuple[int, ...]
    logits: Logits

    @property
    def stop(self) -> int:
        """Tokens of the sequence that are in the cache afterwards."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """What is done next; plain data, that can be logged, replayed and sent.

    Attributes:
        moves: Done first, in order: what the cache's bookkeeping asks of its storage.
        prefill: A part of a prompt.
        decode: One token of each sequence that has its prompt behind it.
    """

    moves: tuple[Move, ...]
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
        tokens: The next token by sequence, or None where its answer is complete. Sequences whose
            row wanted no logits are not in it.
        failed: Sequences whose content in the cache is unknown now. They need not have had a row.
    """

    tokens: Mapping[int, int | None]
    failed: frozenset[int] = frozenset()
