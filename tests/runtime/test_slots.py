"""The slot table against a plain model: sequences never mix, and no known prefix is run again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vlmforge.slots import Keys, SlotTable, common_prefix

CAPACITY = 64
# Few different keys and short prompts, so that prefixes are often shared.
PROMPTS = st.lists(st.integers(-1, 1), min_size=1, max_size=7)
TOKENS = st.lists(st.integers(-1, 1), max_size=3)


def keys(tokens: Sequence[int]) -> Keys:
    return np.array(tokens, np.int64)


def shared(first: Sequence[int | None], second: Sequence[int | None]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class Storage:
    """What a backend keeps: one row of tokens for each slot, moved only when it is told to."""

    def __init__(self, slots: int) -> None:
        self.rows: list[list[int | None]] = [[None] * CAPACITY for _ in range(slots)]
        self.copies: list[tuple[int, int, int]] = []
        self.swaps = 0

    def copy(self, source: int, target: int, tokens: int) -> None:
        assert source != target
        self.copies.append((source, target, tokens))
        self.rows[target][:tokens] = self.rows[source][:tokens]

    def swap(self, first: int, second: int, tokens: int) -> None:
        assert first != second
        self.swaps += 1
        a, b = self.rows[first], self.rows[second]
        a[:tokens], b[:tokens] = b[:tokens], a[:tokens]

    def write(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        self.rows[slot][start : start + len(tokens)] = tokens

    def longest_prefix(self, prompt: Sequence[int]) -> int:
        return max(shared(row, prompt) for row in self.rows)

    def forget(self, slot: int, kept: int) -> None:
        self.rows[slot][kept:] = [None] * (CAPACITY - kept)


class SlotsMatchTheModel(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 4), reuse=st.booleans())
    def make(self, slots: int, reuse: bool) -> None:
        self.storage = Storage(slots)
        self.table = SlotTable(slots, self.storage.copy, self.storage.swap, reuse=reuse)
        self.slots, self.reuse = slots, reuse
        self.sequences: list[list[int]] = []  # what each active one wrote, or found in the cache

    @precondition(lambda self: len(self.sequences) < self.slots)
    @rule(prompt=PROMPTS, fresh=st.booleans())
    def admit(self, prompt: list[int], fresh: bool) -> None:
        known = self.storage.longest_prefix(prompt[:-1]) if self.reuse and not fresh else 0
        placement = self.table.admit(keys(prompt), fresh=fresh)
        assert placement.slot == len(self.sequences)
        assert placement.cached == known
        self.storage.forget(placement.slot, known)  # the rest is about to be overwritten
        self.sequences.append(prompt[:known])
        self._extend(placement.slot, prompt[known:])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=TOKENS)
    def extend(self, data: st.DataObject, tokens: list[int]) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        if len(self.sequences[index]) + len(tokens) <= CAPACITY:
            self._extend(index, tokens)

    def _extend(self, index: int, tokens: list[int]) -> None:
        self.storage.write(index, len(self.sequences[index]), tokens)
        self.sequences[index].extend(tokens)
        self.table.extend(index, keys(tokens))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        moved = self.table.release(index)
        last = self.sequences.pop()
        if index == len(self.sequences):
            assert moved is None
        else:
            assert moved == len(self.sequences)
            self.sequences[index] = last

    @rule()
    def reset(self) -> None:
        self.table.reset()
        self.sequences.clear()
        for slot in range(self.slots):
            self.storage.forget(slot, 0)

    @invariant()
    def active_slots_hold_their_sequences(self) -> None:
        assert self.table.active == len(self.sequences)
        assert self.table.free == self.slots - len(self.sequences)
        for row, sequence in zip(self.storage.rows, self.sequences, strict=False):
            assert row[: len(sequence)] == sequence


TestSlots = SlotsMatchTheModel.TestCase
TestSlots.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


class Served:
    """A table and its storage, serving one prompt after the other."""

    def __init__(self, slots: int) -> None:
        self.storage = Storage(slots)
        self.table = SlotTable(slots, self.storage.copy, self.storage.swap)

    def start(self, prompt: Sequence[int], salt: int = 0) -> int:
        """Run a prompt and leave it active; returns how many of its tokens were known."""
        placed = self.table.admit(keys(prompt), salt=salt)
        slot, cached = placed.slot, placed.cached
        self.storage.write(slot, cached, prompt[cached:])
        self.table.extend(slot, keys(prompt[cached:]))
        return cached

    def serve(self, prompt: Sequence[int]) -> int:
        cached = self.start(prompt)
        self.table.release(self.table.active - 1)
        return cached


def test_the_last_token_is_always_run() -> None:
    served = Served(2)
    assert served.serve([1, 2, 3]) == 0
    assert served.serve([1, 2, 3]) == 2
    assert served.serve([1]) == 0


def test_tokens_of_another_salt_are_never_reused() -> None:
    served = Served(3)
    assert served.serve([1, 2, 3, 4]) == 0
    assert served.start([1, 2, 3, 4, 5], salt=1) == 0
    assert served.start([1, 2, 3, 5]) == 3  # the old one is still there, and of its own salt
    assert served.start([1, 2, 3, 4, 6], salt=1) == 4


def test_the_least_recently_used_slot_is_given_up() -> None:
    served = Served(3)
    for first in (1, 2, 3):
        served.serve([first, 0, 0])
    assert served.serve([1, 0, 0]) == 2  # used again: 2 is the oldest now
    assert served.serve([4, 0, 0]) == 0  # takes the slot of 2
    assert served.serve([1, 0, 0]) == 2
    assert served.serve([3, 0, 0]) == 2
    assert served.serve([2, 0, 0]) == 0


def test_a_slot_is_in_use_until_it_is_released() -> None:
    served = Served(3)
    served.start([1, 0, 0])
    served.start([2, 0, 0])
    served.table.release(1)
    served.table.release(0)  # the first to come is the last to go
    served.serve([3, 0, 0])
    assert served.serve([4, 0, 0]) == 0  # takes the slot of 2
    assert served.serve([1, 0, 0]) == 2


def test_a_free_slot_is_continued_in_place_rather_than_copied() -> None:
    served = Served(3)
    served.serve([1, 2, 3])
    assert served.serve([1, 2, 3, 4, 5]) == 3
    assert served.storage.copies == []


def test_an_active_sequence_lends_its_prefix_by_copy() -> None:
    served = Served(2)
    served.start([1, 2, 3])
    assert served.start([1, 2, 9]) == 2
    assert served.storage.copies == [(0, 1, 2)]
    assert [row[:3] for row in served.storage.rows] == [[1, 2, 3], [1, 2, 9]]


def test_two_conversations_with_one_system_prompt_keep_their_own_slots() -> None:
    system = [7, 7, 7]
    turns = {"a": [*system, *[1] * 20], "b": [*system, *[2] * 20]}
    served = Served(4)
    assert served.serve(turns["a"]) == 0
    assert served.serve(turns["b"]) == len(system)
    for _ in range(4):
        for name in "ab":
            known = len(turns[name])
            turns[name] += [5, 5]
            assert served.serve(turns[name]) == known


def test_slots_never_used_are_not_moved() -> None:
    served = Served(8)
    for first in range(8):
        served.start([first, 1])
    assert served.storage.swaps == 0


@given(st.lists(st.integers(0, 1), max_size=6), st.lists(st.integers(0, 1), max_size=6))
def test_common_prefix(first: list[int], second: list[int]) -> None:
    expected = shared(first, second)
    assert common_prefix(keys(first), keys(second)) == expected
    assert common_prefix(keys(second), keys(first)) == expected
    assert first[:expected] == second[:expected]


@pytest.mark.parametrize("value", [2**62, -(2**63), -1])
def test_common_prefix_of_extreme_keys(value: int) -> None:
    assert common_prefix(keys([value, value]), keys([value, value + 1])) == 1


def test_a_copy_that_fails_leaves_a_slot_that_remembers_nothing() -> None:
    """It was half overwritten: what it remembered before is gone too."""
    broken: list[bool] = []

    def copy(source: int, target: int, tokens: int) -> None:
        if broken:
            raise MemoryError

    table = SlotTable(2, copy, lambda *_: None)
    first, other = np.arange(8), np.arange(100, 108)
    for keys in (first, other):
        table.extend(table.admit(keys).slot, keys)
    table.release(0)  # the other moves there; the first one's tokens are remembered in slot 1
    broken.append(True)
    with pytest.raises(MemoryError):
        table.admit(np.concatenate((other[:4], np.arange(50, 60))))
    broken.clear()
    assert (table.active, table.free) == (1, 1)
    assert table.admit(first).cached == 0


def test_an_exchange_that_fails_leaves_two_slots_that_remember_nothing() -> None:
    broken: list[bool] = []

    def swap(first: int, second: int, tokens: int) -> None:
        if broken:
            raise MemoryError

    table = SlotTable(2, lambda *_: None, swap)
    first, other = np.arange(8), np.arange(100, 108)
    for keys in (first, other):
        table.extend(table.admit(keys).slot, keys)
    broken.append(True)
    with pytest.raises(MemoryError):
        table.release(0)
    broken.clear()
    assert table.active == 2  # nothing was given up
    assert [table.release(1), table.release(0)] == [None, None]
    assert table.admit(first).cached == 0
    assert table.admit(other).cached == 0
