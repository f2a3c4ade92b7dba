"""The stand-in of `stand_in`, as a device: a step is done when it is waited for, and not before."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from msgspec import structs
from typing_extensions import override

from stand_in import Parts
from vlmforge.backends import DecoderBatch, FloatArray, IntArray, KeyValues
from vlmforge.backends.choice import (
    FIRST_TOKENS,
    Begun,
    BegunPrompts,
    Choice,
    FirstTokenDecoder,
    OverlappingDecoder,
    Picked,
)
from vlmforge.backends.choice import Found as OfPrompt
from vlmforge.kv.cache import Copy, Move

Found = Sequence[Picked | np.int64 | None]
T = TypeVar("T")


@dataclass(eq=False)
class BegunLate(Begun[T]):
    """A step that is done when it is waited for."""

    rows: Sequence[int]
    parts: LateParts
    work: Callable[[], T]
    seconds: float = 0.0
    outcome: T | BaseException | None = None
    ids: list[int] = field(default_factory=list)

    def run(self) -> None:
        try:
            self.outcome = self.work()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self.outcome = error

    @override
    def wait(self) -> T:
        self.parts.catch_up(self)
        self.seconds = 1e-6
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome


class LateParts(Parts, OverlappingDecoder):
    """See the module.

    Attributes:
        begun: Rows of each step that was begun while another one ran.
        undecided: One of so many tokens is left to the host.
    """

    def __init__(self, slots: int, undecided: int = 1 << 60) -> None:
        super().__init__(slots)
        self.begun: list[int] = []
        self.undecided = undecided
        self._queue: deque[BegunLate[Any]] = deque()
        self._latest: BegunLate[Any] | None = None
        self._first: BegunLate[Any] | None = None

    @override
    def can_begin(self, rows: int, choices: Sequence[Choice] | None) -> bool:
        self._called("can_begin")
        return choices is None or all(not c.logprobs for c in choices)

    @override
    def begin(
        self, batch: DecoderBatch, choices: Sequence[Choice] | None, ahead: IntArray
    ) -> Begun[Found]:
        self._called("begin")
        before = self._latest
        if self._queue:
            self.begun.append(len(ahead))
        made, first = BegunLate[Found](batch.slots, self, list), self._first
        made.work = lambda: self._do(made, (before, first), batch, choices, ahead)
        self._queue.append(made)
        self._latest = made
        return made

    @override
    def begin_prompts(self, batch: DecoderBatch) -> BegunPrompts:
        self._called("begin_prompts")
        step = super().step
        made = BegunLate[Sequence[FloatArray]](batch.slots, self, lambda: list(step(batch)))
        self._queue.append(made)
        return made

    def _do(
        self,
        made: BegunLate[Found],
        sources: tuple[BegunLate[Any] | None, BegunLate[Any] | None],
        batch: DecoderBatch,
        choices: Sequence[Choice] | None,
        ahead: IntArray,
    ) -> Found:
        ids = batch.input_ids.copy()
        for row, source in enumerate(ahead.tolist()):
            if source >= 0:
                before = sources[source >= FIRST_TOKENS]
                assert before is not None
                # Of a step that failed nobody knows what is there.
                ids[row, 0] = before.ids[source % FIRST_TOKENS] if before.ids else 5
        logits = super().step(structs.replace(batch, input_ids=ids))[:, 0]
        found: list[Picked | np.int64 | None] = []
        for row, values in enumerate(logits):
            choice = None if choices is None else choices[row]
            if choice is not None and choice.behind is not None:
                assert ahead[row] >= 0
                values = _edited(values, *(np.array([x]) for x in (ids[row, 0], *choice.behind)))
            token = self._chosen(values, choice)
            made.ids.append(7 if token is None else token)
            if token is None or choices is None:
                found.append(None if token is None else np.int64(token))
            else:
                found.append(Picked(token))
        return found

    def _chosen(self, logits: FloatArray, choice: Choice | None) -> int | None:
        """None: it cannot be said here."""
        likeliest = int(logits.argmax())
        if choice is not None and len(choice.edits.ids):
            edits = choice.edits
            logits = _edited(logits, edits.ids, edits.factors, edits.minus)
            likeliest = int(logits.argmax())
        if choice is not None and not zlib.crc32(logits.tobytes()) % self.undecided:
            return None
        if choice is None or choice.numbers[-1] < 0:
            return likeliest
        temperature, _, _, _, number = choice.numbers
        weights = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
        total = np.cumsum(weights)
        return int(np.searchsorted(total, number * total[-1], side="right"))

    def catch_up(self, last: BegunLate[Any] | None = None) -> None:
        """Do what was begun, up to `last`."""
        while self._queue and (last is None or last.outcome is None):
            self._queue.popleft().run()

    @override
    def step(self, batch: DecoderBatch) -> FloatArray:
        self.catch_up()
        return super().step(batch)

    @override
    def move(self, move: Move) -> None:
        if isinstance(move, Copy):  # who has left a place has no row under way
            self.catch_up()
        super().move(move)

    @override
    def read(self, place: Sequence[int], tokens: int) -> KeyValues:
        self.catch_up()
        return super().read(place, tokens)

    @override
    def write(self, place: Sequence[int], rows: Any, start: int) -> None:
        self.catch_up()
        super().write(place, rows, start)


class FirstParts(LateParts, FirstTokenDecoder):
    """One that chooses the tokens behind prompts too."""

    @override
    def begin_first(
        self, batch: DecoderBatch, choices: Sequence[Choice | None] | None
    ) -> Begun[Sequence[OfPrompt]]:
        self._called("begin_first")
        made = BegunLate[Sequence[OfPrompt]](batch.slots, self, list)

        def work() -> Sequence[OfPrompt]:
            found: list[OfPrompt] = []
            for row, logits in enumerate(Parts.step(self, batch)):
                choice = None if choices is None else choices[row]
                asked = choices is None or choice is not None
                token = self._chosen(logits[0], choice) if asked else None
                made.ids.append(7 if token is None else token)
                if token is None:
                    found.append(logits)
                else:
                    found.append(np.int64(token) if choices is None else Picked(token))
            return found

        made.work = work
        self._queue.append(made)
        self._first = made
        return made


def _edited(logits: FloatArray, ids: Any, factors: Any, minus: Any) -> FloatArray:
    """As a device does it: an edit that is there twice, with the same numbers, counts once."""
    found, before = logits.copy(), logits[ids]
    found[ids] = np.where(before < 0, before * factors, before / factors) - minus
    return found
