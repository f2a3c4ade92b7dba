"""A decoder of several ranks whose steps overlap with the host's work, as those of one rank do.

The other ranks are told of a step and begin it too; nobody waits for them. What one step needs of
the one before is on each rank's device by then. A rank that fails meanwhile is found out by
whoever waits for the first one's device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from vlmforge.backends import DecoderBatch, DecoderSession, FloatArray, IntArray, LikeliestDecoder
from vlmforge.backends.choice import (
    Begun,
    BegunPrompts,
    BegunTokens,
    Choice,
    ChoosingDecoder,
    OverlappingDecoder,
    Picked,
    T_co,
)
from vlmforge.backends.ranks.calls import NextTokens, OtherRanks, RankedDecoder


@dataclass(slots=True)
class _Begun(Begun[T_co]):
    """What the first rank has begun, and the others with it."""

    own: Begun[T_co]
    decoder: RankedDecoder
    seconds: float = 0.0

    @override
    def wait(self) -> T_co:
        with self.decoder.all_or_none():
            found = self.own.wait()
        self.seconds = self.own.seconds
        return found


class OverlappingRanks(RankedDecoder, OverlappingDecoder):
    """See the module. The first rank has the logits on a device, and can choose tokens there."""

    def __init__(self, own: DecoderSession, others: OtherRanks) -> None:
        super().__init__(own, others)
        assert isinstance(own, LikeliestDecoder) and isinstance(own, ChoosingDecoder)
        self._likeliest, self._choosing, self.chooses = own, own, own.chooses
        assert isinstance(own, OverlappingDecoder)
        self._device = own

    def likeliest(self, batch: DecoderBatch) -> IntArray:
        """See `LikeliestDecoder`."""
        with self.together(batch):
            return self._likeliest.likeliest(batch)

    def choose(
        self, batch: DecoderBatch, choices: Sequence[Choice | None]
    ) -> Sequence[Picked | FloatArray]:
        """See `ChoosingDecoder`."""
        nothing = np.full(len(batch.slots), -1, np.int64)
        with self.together(NextTokens(batch, nothing, chosen=True)):
            return self._choosing.choose(batch, choices)

    @override
    def can_begin(self, rows: int, choices: Sequence[Choice] | None) -> bool:
        return self._device.can_begin(rows, choices)

    @override
    def begin(
        self, batch: DecoderBatch, choices: Sequence[Choice] | None, ahead: IntArray
    ) -> BegunTokens:
        with self.together(NextTokens(batch, ahead, chosen=choices is not None)):
            return _Begun(self._device.begin(batch, choices, ahead), self)

    @override
    def begin_prompts(self, batch: DecoderBatch) -> BegunPrompts:
        with self.together(batch):
            return _Begun(self._device.begin_prompts(batch), self)


def ranked(own: DecoderSession, others: OtherRanks) -> RankedDecoder:
    """The decoder of all ranks, which can what the first one's can."""
    overlaps = isinstance(own, OverlappingDecoder)
    return OverlappingRanks(own, others) if overlaps else RankedDecoder(own, others)
