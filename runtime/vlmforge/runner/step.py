"""What flows between scheduler and runner: a step, and what came of it. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlmforge.kv.cache import Move

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
        forks: Sequences of other answers to this prompt, which ends here: the first token of each
            is chosen from the same logits.
    """

    sequence: int
    tokens: tuple[int, ...]
    start: int
    place: tuple[int, ...]
    logits: Logits
    forks: tuple[int, ...] = ()

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
