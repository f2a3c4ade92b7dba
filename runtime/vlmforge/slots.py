"""Which sequence is in which key/value slot, and what a slot still remembers.

Active sequences occupy the slots `0 .. active`, so that one decoding step runs over one contiguous
block. A slot that is given up keeps its tokens: a later prompt with the same beginning goes on from
there. Tokens are compared by keys: a text token's key is its id, an image row's key is derived from
the image's content, so equal placeholders of different images never match.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]
_NO_KEYS: Keys = np.empty(0, np.int64)


@dataclass(slots=True)
class _Slot:
    keys: Keys = field(default_factory=lambda: _NO_KEYS)
    salt: int = 0
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a new sequence goes, and how many tokens of its prompt are in the cache already."""

    slot: int
    cached: int


class SlotTable:
    """Bookkeeping of the slots; `copy` and `swap` move the data (see `DecoderSession`)."""

    def __init__(
        self,
        slots: int,
        copy: Callable[[int, int, int], None],
        swap: Callable[[int, int, int], None],
        *,
        reuse: bool = True,
    ) -> None:
        self._slots = [_Slot() for _ in range(slots)]
        self._copy, self._swap, self._reuse = copy, swap, reuse
        self._clock = 0
        self.active = 0

    @property
    def free(self) -> int:
        """Number of slots without an active sequence."""
        return len(self._slots) - self.active

    def admit(self, keys: Keys, *, fresh: bool = False, salt: int = 0) -> Placement:
        """Place a new sequence with the prompt `keys` in slot `active`; there must be a free one.

        At least the prompt's last token is left to run, because its logits are needed. `fresh`
        reuses nothing, so that the whole prompt is run.
        Tokens of a sequence with another `salt` are never reused: their keys and values differ.
        When moving data fails, the error is passed on, no sequence is placed, and no slot without
        one remembers anything that may be half moved.
        """
        target = self.active
        source, cached = self._longest_prefix(keys[:0] if fresh else keys[:-1], salt)
        place = source if self._goes_on(source, cached) else self._least_recently_used()
        self.exchange(place, target)
        slot = self._slots[target]
        if place != source:
            slot.keys = _NO_KEYS
            self._copy(place if source == target else source, target, cached)
        slot.keys, slot.salt = keys[:cached], salt
        self._touch(slot)
        self.active += 1
        return Placement(target, cached)

    def extend(self, index: int, keys: Keys) -> None:
        """Note that the tokens `keys` were written to the slot."""
        slot = self._slots[index]
        slot.keys = np.concatenate((slot.keys, keys))

    def release(self, index: int) -> int | None:
        """Give up a slot. The last active sequence moves into it; returns that one's old slot.

        When the move fails, the error is passed on and nothing was given up (see `exchange`).
        """
        last = self.active - 1
        self.exchange(index, last)
        self._touch(self._slots[last])
        self.active = last
        return None if index == last else last

    def exchange(self, first: int, second: int) -> None:
        """Two slots change places, with all that was noted for them.

        When moving the data fails, the error is passed on and both are forgotten: nobody knows
        what is in them.
        """
        if first == second:
            return
        slots = self._slots
        tokens = max(len(slots[first].keys), len(slots[second].keys))
        if tokens:
            try:
                self._swap(first, second, tokens)
            except BaseException:
                self.forget(first)
                self.forget(second)
                raise
        slots[first], slots[second] = slots[second], slots[first]

    def forget(self, index: int) -> None:
        """What is in the slot is of no use to anybody: a step failed on it."""
        self._slots[index].keys = _NO_KEYS

    def reset(self) -> None:
        """Forget everything."""
        for index in range(len(self._slots)):
            self.forget(index)
        self.active = 0

    def _longest_prefix(self, keys: Keys, salt: int) -> tuple[int, int]:
        """The slot that shares the most first tokens with `keys`; a free one if none does."""
        best, best_length = self._least_recently_used(), 0
        if not self._reuse:
            return best, 0
        for index, slot in enumerate(self._slots):
            length = common_prefix(slot.keys, keys) if slot.salt == salt else 0
            # Between equals, one that is free: reuse in place costs no copy.
            if length > best_length or (length == best_length > 0 and index >= self.active > best):
                best, best_length = index, length
        return best, best_length

    def _goes_on(self, source: int, cached: int) -> bool:
        """Whether a prompt continues what a free slot remembers, and may thus take it over.

        One that shares only the beginning, such as a system prompt, must not wipe out the rest.
        """
        return source >= self.active and 2 * cached >= len(self._slots[source].keys)

    def _least_recently_used(self) -> int:
        return min(range(self.active, len(self._slots)), key=lambda i: self._slots[i].last_used)

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.last_used = self._clock


def common_prefix(first: Keys, second: Keys) -> int:
    """Number of equal elements at the beginning."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length
