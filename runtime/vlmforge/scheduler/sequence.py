"""A sequence of tokens that is being run."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct, field

from vlmforge.kv.cache import NO_KEYS, Keys, joined


class State(enum.Enum):
    """Where a sequence is: it begins WAITING, and may go back to it when room is short.

    HELD are the forks of one whose prompt has not been run.
    """

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class TokenSequence(Struct, eq=False):
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
        parent: Another answer to the same prompt, whose tokens this one goes on from.
        forks: Sequences that part from it once its prompt has been run.
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
    parent: TokenSequence | None = None
    forks: list[TokenSequence] = field(default_factory=list)
    prompt_length: int = 0
    _room: Keys = field(default_factory=lambda: NO_KEYS)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def begun(self) -> bool:
        """Whether a token of the answer is there."""
        return len(self.tokens) > self.prompt_length

    @property
    def wants_all(self) -> bool:
        """Whether the logits after each token of the prompt are wanted."""
        return self.fresh and not self.begun

    @property
    def decoding(self) -> bool:
        """Whether nothing but its newest token is left to run."""
        return self.prompt_length < len(self.tokens) == self.computed + 1

    def fork(self, sequence: int) -> None:
        """Have a fork of this id, for another answer to the prompt; `append` nothing before."""
        fork = TokenSequence(sequence, list(self.tokens), self.keys, self.salt, self.priority)
        fork.state, fork.parent = State.HELD, self
        self.forks.append(fork)

    def append(self, token: int) -> None:
        """A token was generated."""
        self.tokens.append(token)
        self.keys, self._room = joined(self.keys, (token,), self._room)


def order(sequence: TokenSequence) -> tuple[int, int]:
    """Who is served first."""
    return -sequence.priority, sequence.id


class SequenceError(Exception):
    """The cache failed at one sequence; what it raised is the cause. Nothing was planned."""

    def __init__(self, sequence: TokenSequence) -> None:
        super().__init__(sequence.id)
        self.sequence = sequence


@contextmanager
def failing(sequence: TokenSequence) -> Iterator[None]:
    """Makes what the cache raises a `SequenceError`. What is done for each token has it written."""
    try:
        yield
    except BaseException as error:
        raise SequenceError(sequence) from error
