"""Where slots lie in a dense cache, so that the sequences of one step lie side by side.

A graph that reads and writes its cache in place takes one block of rows. Which slot is in which
row is nobody else's business: before a step, a few rows change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

_TURN_TOKENS = 256  # a row that is in the wrong order is moved later

Order = list[int] | slice
"""Of a batch's rows in the cache; a slice where they lie as they are."""


class Exchange(Struct, frozen=True):
    """Rows `first` and `second` change places; so many tokens of each matter."""

    first: int
    second: int
    first_tokens: int
    second_tokens: int


class Arrangement(Struct, frozen=True, dict=True):
    """After `exchanges`, the slots lie in the rows `first_row, first_row + 1, ...`.

    `order[i]` is the place, in the list that was asked for, of the slot in row `first_row + i`.
    """

    first_row: int
    order: tuple[int, ...]
    exchanges: tuple[Exchange, ...]

    @cached_property
    def index(self) -> Order:
        """`order`, to index what there is of each slot with."""
        order = list(self.order)
        return slice(len(order)) if order == list(range(len(order))) else order


class Rows:
    """The permutation of `count` slots, and how many tokens are in each row."""

    def __init__(self, count: int) -> None:
        self._row_of = list(range(count))
        self._slot_in = list(range(count))
        self._tokens = [0] * count  # by row
        self._said: dict[tuple[int, ...], NDArray[np.int64]] = {}  # tokens, not looked at yet
        self._running = set[int]()  # slots that ran and have not left
        self._down = False  # the last one joined below the others
        self._settled: dict[tuple[int, ...], Arrangement] = {}  # of slots that lie so

    def row(self, slot: int) -> int:
        """Where a slot is now."""
        return self._row_of[slot]

    def tokens(self, slot: int) -> int:
        """How many of a slot's first tokens matter."""
        self._listen()
        return self._tokens[self._row_of[slot]]

    def set_tokens(self, slot: int, tokens: int) -> None:
        """From now on the slot's first `tokens` tokens matter."""
        self._listen()
        self._tokens[self._row_of[slot]] = tokens

    def reach(self, slots: tuple[int, ...], tokens: NDArray[np.int64]) -> None:
        """Of each slot at least so many tokens matter.

        Most steps have the slots of the one before, and ask nothing.
        """
        before = self._said.get(slots)
        self._said[slots] = tokens if before is None else np.maximum(before, tokens)

    def _listen(self) -> None:
        for slots, tokens in self._said.items():
            for slot, count in zip(slots, tokens.tolist(), strict=True):
                row = self._row_of[slot]
                self._tokens[row] = max(self._tokens[row], count)
        self._said.clear()

    def arrange(self, slots: Sequence[int]) -> Arrangement:
        """Bring the slots, all different, side by side; as few tokens as possible are moved."""
        settled = self._settled.get(tuple(slots))  # mostly: those of the step before
        if settled is not None:
            return settled
        self._listen()
        if len(slots) == 1:
            return self._alone(slots[0])
        self._running.update(slots)
        members = {self._row_of[slot] for slot in slots}
        first = min(members)
        if max(members) - first + 1 > len(slots):  # mostly they are side by side already
            first = self._cheapest_window(members, len(slots))
        window = range(first, first + len(slots))
        guests = [row for row in window if row not in members]
        away = sorted(members.difference(window))
        exchanges = tuple(self._exchange(a, b) for a, b in zip(guests, away, strict=True))
        place = {slot: index for index, slot in enumerate(slots)}
        order = tuple(place[self._slot_in[row]] for row in window)
        self._settled[tuple(slots)] = Arrangement(first, order, ())
        return Arrangement(first, order, exchanges)

    def _alone(self, slot: int) -> Arrangement:
        exchanges: tuple[Exchange, ...] = ()
        if self._tokens[self._row_of[slot]] == 0:
            exchanges = self._joined(slot)
        self._running.add(slot)
        row = self._row_of[slot]
        self._settled[(slot,)] = Arrangement(row, (0,), ())
        return Arrangement(row, (0,), exchanges)

    def leave(self, slot: int, tokens: int) -> None:
        """A slot runs no more; its first `tokens` tokens may be of use yet."""
        self.set_tokens(slot, tokens)
        self._running.discard(slot)
        self._settled = {}

    def renew(self, slot: int) -> tuple[Exchange, ...]:
        """What a slot holds is of no use any more; it goes where it will be wanted."""
        self.leave(slot, 0)
        return self._joined(slot)

    def _joined(self, slot: int) -> tuple[Exchange, ...]:
        """One that holds nothing goes beside those that run.

        In the order in which they begin, if that moves few tokens more: who began first mostly ends
        first, and then the others lie side by side still.
        """
        if not self._running:
            return ()
        row, rows = self._row_of[slot], [self._row_of[other] for other in self._running]
        below, above = min(rows) - 1, max(rows) + 1
        sides = [side for side in (below, above) if 0 <= side < len(self._row_of)]
        if below <= row <= above or not sides:
            return ()

        def price(side: int) -> int:
            turns = (side == below) != self._down
            return self._tokens[side] + (_TURN_TOKENS if turns else 0)

        side = min(sides, key=price)
        self._down = side == below
        return (self._exchange(row, side),)

    def _cheapest_window(self, members: set[int], length: int) -> int:
        """The first of `length` rows for which the fewest tokens have to move."""

        def gain(row: int) -> int:
            # One more for each: of two with nothing in them, the one that is there stays.
            return self._tokens[row] + 1 if row in members else -self._tokens[row] - 1

        best = total = sum(gain(row) for row in range(length))
        first = 0
        for start in range(1, len(self._slot_in) - length + 1):
            total += gain(start + length - 1) - gain(start - 1)
            if total > best:
                best, first = total, start
        return first

    def _exchange(self, first: int, second: int) -> Exchange:
        exchange = Exchange(first, second, self._tokens[first], self._tokens[second])
        self._settled = {}
        for values in (self._slot_in, self._tokens):
            values[first], values[second] = values[second], values[first]
        for row in (first, second):
            self._row_of[self._slot_in[row]] = row
        return exchange
