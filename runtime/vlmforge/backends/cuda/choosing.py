"""Tokens chosen on the device, by a graph of the engine's, from numbers that the host gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.backends.choice import GREEDY, NO_EDITS, Choice, Picked
from vlmforge.backends.cuda.device import Arriving, Device, Segment, Tensor, Work
from vlmforge.backends.cuda.frames import Arrangement, in_a_row, shape_of
from vlmforge.engine import chain
from vlmforge.engine.interface import (
    BATCH,
    BEST_IDS,
    BEST_LOGITS,
    CHOICES,
    CHOSEN,
    CHOSEN_LOGIT,
    EDIT_FACTORS,
    EDIT_IDS,
    EDIT_MINUS,
    EDITS,
    LOGITS,
    NORMALISER,
)
from vlmforge.engine.tensors import TensorSpec

MOST_EDITS = 4096
_LEAST_EDITS, _GROWTH = 16, 16


class _Frame(Struct):
    """The choice for batches of one size, from logits at one place."""

    arrangement: Arrangement
    inputs: NDArray[np.uint8]
    views: Mapping[str, NDArray[Any]]
    work: Work
    again: bool  # it comes again
    runs: int = 0

    @property
    def dims(self) -> Mapping[str, int]:
        """Rows by their dimension's name."""
        return {BATCH: self.views[CHOICES.name].shape[0]}


class TokenSampler:
    """See the module. Captured for each size and place of logits when it has run once.

    Args:
        device: Runs it.
        loaded: The graph, or what does the same.
        segment: What it takes and gives.
        rows: Of a batch, at most.
    """

    def __init__(self, device: Device, loaded: Segment, segment: chain.Segment, rows: int) -> None:
        self._device, self._segment = device, loaded
        self._logits, *inputs = segment.inputs
        self._inputs, self._outputs = tuple(inputs), segment.outputs
        best = next(spec for spec in segment.outputs if spec.name == BEST_IDS)
        self._reported = int(best.shape[-1])
        most = in_a_row(self._inputs, self._outputs, {BATCH: rows, EDITS: MOST_EDITS})
        self._arena = device.allocate(most.size)
        self._frames: dict[tuple[int, int, int, bool], _Frame] = {}

    def prepare(
        self, rows: int, logits: int, choices: Sequence[Choice | None], *, again: bool = True
    ) -> _Frame:
        """Upload what `choices` say of the first of `rows` rows, whose logits will be at `logits`.

        Those of rows without a choice, or with more edits than fit, play no part. `again`: there
        will be many choices of this size from this place.
        """
        given = [choice if self.takes(choice) else GREEDY for choice in choices]
        longest = max((_edits(choice) for choice in given if choice), default=0)
        edits = _LEAST_EDITS
        while edits < longest:
            edits *= _GROWTH
        key = rows, logits, edits, _tells(choices)
        frame = self._frames.get(key) or self._bound(*key, again)
        if again:
            self._frames[key] = frame
        for row in range(rows):
            _fill(frame.views, row, (given[row] if row < len(given) else None) or GREEDY)
        self._device.upload(self._arena.address, frame.inputs)
        return frame

    def takes(self, choice: Choice | None) -> bool:
        """Whether it can be made here."""
        if choice is None:
            return False
        return _edits(choice) <= MOST_EDITS and choice.logprobs <= self._reported

    def tell(self, frame: _Frame, row: int, choice: Choice | None, token: int) -> None:
        """The token before that of a row will be at the address `token`: see `Choice.behind`."""
        if choice is None or choice.behind is None or not self.takes(choice):
            return
        width = frame.views[EDIT_IDS.name].shape[1]
        place = row * width + len(choice.edits.ids)
        begin = self._arena.address + frame.arrangement.offsets[EDIT_IDS.name]
        self._device.copy(token, begin + 8 * place, 8)

    def run(self, frame: _Frame) -> int:
        """Enqueue the choice; where the tokens will be, int64 `[rows]`."""
        frame.work()
        frame.runs += 1
        if frame.again and frame.runs == 1:
            frame.work = self._device.captured(frame.work)
        return self._arena.address + frame.arrangement.offsets[CHOSEN.name]

    def found(self, frame: _Frame, choices: Sequence[Choice | None]) -> list[Picked | None]:
        """Wait for the tokens; None for rows that have none."""
        return self.read(frame, choices, self.fetch(frame, choices).wait())

    def fetch(self, frame: _Frame, choices: Sequence[Choice | None]) -> Arriving:
        """Have brought here what `read` makes tokens of."""
        outputs = self._told(choices)
        offsets, last = frame.arrangement.offsets, outputs[-1]
        begin = offsets[CHOSEN.name]
        end = offsets[last.name] + 8 * math.prod(shape_of(last, frame.dims))
        return self._device.fetch(self._arena.address + begin, end - begin)

    def read(
        self, frame: _Frame, choices: Sequence[Choice | None], raw: NDArray[np.uint8]
    ) -> list[Picked | None]:
        """See `found`."""
        outputs, offsets = self._told(choices), frame.arrangement.offsets
        begin = offsets[CHOSEN.name]
        behind = Arrangement({spec.name: offsets[spec.name] - begin for spec in outputs}, 0, 0)
        values = {spec.name: behind.view(raw, spec, frame.dims) for spec in outputs}
        return [
            self._picked(values, row, choice) if self.takes(choice) else None
            for row, choice in enumerate(choices)
        ]

    def _told(self, choices: Sequence[Choice | None]) -> tuple[TensorSpec, ...]:
        """The outputs that are of use, which lie one behind the other: mostly nothing but ids."""
        return self._outputs if _tells(choices) else (CHOSEN,)

    def _picked(
        self, values: Mapping[str, NDArray[Any]], row: int, choice: Choice | None
    ) -> Picked | None:
        token = int(values[CHOSEN.name][row, 0])
        if token < 0 or choice is None:
            return None
        if not choice.logprobs:
            return Picked(token)
        normaliser = float(values[NORMALISER.name][row, 0])
        pairs = zip(values[BEST_IDS][row].tolist(), values[BEST_LOGITS][row].tolist(), strict=True)
        best = itertools.islice(pairs, choice.logprobs)
        likeliest = {i: value - normaliser for i, value in best if value > -np.inf}
        return Picked(token, float(values[CHOSEN_LOGIT.name][row, 0]) - normaliser, likeliest)

    def _bound(self, rows: int, logits: int, edits: int, tells: bool, again: bool) -> _Frame:
        dims = {BATCH: rows, EDITS: edits}
        arrangement = in_a_row(self._inputs, self._outputs, dims)
        at = {n: self._arena.address + offset for n, offset in arrangement.offsets.items()}
        at[LOGITS] = logits

        def tensors(specs: Sequence[TensorSpec]) -> list[Tensor]:
            return [Tensor(s.name, s.dtype, shape_of(s, dims), at[s.name]) for s in specs]

        outputs = self._outputs if tells else (CHOSEN,)
        work = self._segment.bind(tensors((self._logits, *self._inputs)), tensors(outputs))
        inputs = np.zeros(arrangement.uploaded, np.uint8)
        views = {spec.name: arrangement.view(inputs, spec, dims) for spec in self._inputs}
        return _Frame(arrangement, inputs, views, work, again)


def _tells(choices: Sequence[Choice | None]) -> bool:
    """Whether any is to be told more than the id."""
    return any(choice is not None and choice.logprobs for choice in choices)


def _edits(choice: Choice) -> int:
    """How many logits are changed, that of the token before included."""
    return len(choice.edits.ids) + (choice.behind is not None)


def _fill(views: Mapping[str, NDArray[Any]], row: int, choice: Choice) -> None:
    views[CHOICES.name][row] = choice.numbers
    edits, behind = choice.edits, choice.behind
    empty = edits is NO_EDITS or not len(edits.ids)
    for name, values, nothing, last in (
        (EDIT_IDS.name, edits.ids, 0, None),
        (EDIT_FACTORS.name, edits.factors, 1, None if behind is None else behind[0]),
        (EDIT_MINUS.name, edits.minus, 0, None if behind is None else behind[1]),
    ):
        # What fills up a row says what is said already: each id has one logit.
        views[name][row] = nothing if empty else values[-1]
        views[name][row, : len(values)] = values
        if last is not None:
            views[name][row, len(values)] = last
