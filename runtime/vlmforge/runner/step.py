"""What flows between scheduler and runner: a step, and what came of it. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from msgspec import Struct

from vlmforge.kv.cache import Move

Logits = Literal["none", "last", "all"]
AHEAD = -1
"""The id of a token that nobody knows yet: the step before, which still runs, gives it."""


class Row(NamedTuple):
    """What a step runs of one sequence. A tuple: there are many, and they are made fast.

    Attributes:
        sequence: Its id.
        tokens: Their ids; an id >= vocab_size is a row of the images' features; or `AHEAD` alone.
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


class Step(Struct, frozen=True):
    """What is done next; plain data, that can be logged, replayed and sent.

    Attributes:
        moves: Done first, in order: what the cache's bookkeeping asks of its storage.
        prefill: A part of a prompt.
        decode: One token of each sequence that has its prompt behind it.
        together: Parts of other prompts that are run with `prefill`: at once, or one after the
            other (`LoadOptions.apart`).
    """

    moves: tuple[Move, ...]
    prefill: Row | None
    decode: tuple[Row, ...]
    together: tuple[Row, ...] = ()

    @property
    def prompts(self) -> tuple[Row, ...]:
        """The parts of prompts."""
        return () if self.prefill is None else (self.prefill, *self.together)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them."""
        return (*self.prompts, *self.decode)


class StepResult(Struct, frozen=True):
    """What came of a step.

    Attributes:
        tokens: The next token by sequence, or None where its answer is complete. Sequences whose
            row wanted no logits are not in it.
        failed: Sequences whose content in the cache is unknown now. They need not have had a row.
        again: Sequences whose row counts for nothing, and is to be run again.
    """

    tokens: Mapping[int, int | None]
    failed: frozenset[int] = frozenset()
    again: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step did, and when: the logger "vlmforge.steps" gets one for each, at level DEBUG.

    Attributes:
        step: As it was planned.
        begun: When (`time.perf_counter`).
        images: Of the prompts, that the vision part was run for.
        encode: Seconds that this took.
        prompt: Seconds that the parts of prompts took beside.
        decode: Seconds of the decoding, the choice of tokens included.
    """

    step: Step
    begun: float
    images: int
    encode: float
    prompt: float
    decode: float

    def __str__(self) -> str:
        did = []
        if self.images:
            did.append(f"{self.images} images in {self.encode:.4f} s")
        if self.step.prompts:
            parts = (f"{row.sequence} [{row.start}:{row.stop}]" for row in self.step.prompts)
            did.append(f"prompt of {' '.join(parts)} in {self.prompt:.4f} s")
        if self.step.decode:
            names = " ".join(str(row.sequence) for row in self.step.decode)
            did.append(f"a token of {names} in {self.decode:.4f} s")
        return ", ".join(did)
