"""Slots: a budget that is never passed, prefixes as by brute force, content that stays whole."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conftest import examples
from vlmforge.kv.cache import Copy, Drop
from vlmforge.kv.slots import SlotCache

SLOTS, CAPACITY, BLOCK, BUDGET = 4, 24, 4, 11


class Slots(RuleBasedStateMachine):
    """Sequences that begin, grow and end; the content of every slot is kept in a list beside."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = SlotCache(SLOTS, CAPACITY, budget=BUDGET, block_size=BLOCK)
        self.content: dict[int, list[int]] = {}
        self.stored: list[list[int]] = [[] for _ in range(SLOTS)]
        self.next_id = 0

    @rule(keys=st.lists(st.integers(0, 1), min_size=1, max_size=CAPACITY), reuse=st.booleans())
    def begin(self, keys: list[int], reuse: bool) -> None:
        before = [list(stored) for stored in self.stored]
        held = self.cache.held_blocks
        cached = self.cache.begin(self.next_id, np.array(keys), salt=b"", reuse=reuse)
        if cached is None:
            assert len(self.content) == SLOTS or held + -(-len(keys) // BLOCK) > BUDGET
            assert not self.cache.take_moves()
            return
        self.carry_out()
        best = max(_common(stored, keys[:-1]) for stored in before) if reuse else 0
        assert cached == best
        (place,) = self.cache.place(self.next_id)
        assert self.stored[place][:cached] == keys[:cached]
        self.stored[place] = keys[:cached]  # behind them is what will be written over
        self.content[self.next_id] = keys[:cached]
        self.next_id += 1

    @precondition(lambda self: self.content)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        request = data.draw(st.sampled_from(sorted(self.content)))
        written = self.content[request]
        if not self.cache.grow(request, len(written) + len(more)):
            assert not self.cache.take_moves()
            return
        self.carry_out()
        written += more
        self.stored[self.cache.place(request)[0]] = list(written)
        self.cache.note(request, np.array(more))

    @precondition(lambda self: self.content)
    @rule(data=st.data(), valid=st.booleans())
    def end(self, data: st.DataObject, valid: bool) -> None:
        request = data.draw(st.sampled_from(sorted(self.content)))
        self.cache.free(request, valid=valid)
        self.carry_out()
        del self.content[request]

    @rule(keys=st.lists(st.integers(0, 1), max_size=CAPACITY))
    def find(self, keys: list[int]) -> None:
        place, tokens = self.cache.find(np.array(keys, np.int64), salt=b"")
        assert tokens == max(_common(stored, keys) for stored in self.stored)
        assert not tokens or self.stored[place[0]][:tokens] == keys[:tokens]
        assert self.cache.find(np.array(keys, np.int64), salt=b"x")[1] == 0
        assert not self.cache.take_moves()

    def carry_out(self) -> None:
        for move in self.cache.take_moves():
            match move:
                case Copy():
                    self.stored[move.target] = self.stored[move.source][: move.tokens]
                case Drop():
                    self.stored[move.place] = self.stored[move.place][: move.tokens]

    @invariant()
    def the_budget_holds_and_the_content_is_whole(self) -> None:
        assert self.cache.held_blocks <= self.cache.used_blocks <= BUDGET
        touched = sum(-(-len(stored) // BLOCK) for stored in self.stored)
        assert touched <= self.cache.used_blocks
        for request, written in self.content.items():
            assert self.stored[self.cache.place(request)[0]][: len(written)] == written
        places = [self.cache.place(request)[0] for request in self.content]
        assert len(set(places)) == len(places)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=examples(60), stateful_step_count=40)


def _common(first: list[int], second: list[int]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def sequence(cache: SlotCache, request: int, keys: list[int], *, salt: bytes = b"") -> int:
    cached = cache.begin(request, np.array(keys), salt=salt, reuse=True)
    assert cached is not None
    assert cache.grow(request, len(keys))
    cache.note(request, np.array(keys[cached:]))
    return cached


def test_the_last_token_is_run_although_all_are_there() -> None:
    cache = SlotCache(2, 100, budget=50)
    sequence(cache, 0, [1, 2, 3])
    cache.free(0)
    assert sequence(cache, 1, [1, 2, 3]) == 2


def test_a_conversation_goes_on_in_its_own_slot() -> None:
    cache = SlotCache(2, 100, budget=50)
    sequence(cache, 0, [1, 2, 3])
    cache.free(0)
    first = cache.take_moves()
    assert sequence(cache, 1, [1, 2, 3, 4, 5]) == 3
    assert not [move for move in (*first, *cache.take_moves()) if isinstance(move, Copy)]


def test_a_shared_beginning_is_copied_and_the_rest_is_kept() -> None:
    cache = SlotCache(2, 100, budget=50)
    sequence(cache, 0, [7, 7, *range(10)])
    cache.free(0)
    assert sequence(cache, 1, [7, 7, 99]) == 2
    cache.free(1)
    assert sequence(cache, 2, [7, 7, *range(10), 11]) == 12


def test_memory_that_a_prompt_takes_at_once_is_not_given_back_first() -> None:
    cache = SlotCache(1, 300, budget=50, block_size=4)
    sequence(cache, 0, list(range(200)))
    cache.free(0)
    cache.take_moves()
    sequence(cache, 1, [0, 1, *range(500, 590)])
    assert cache.take_moves() == (Drop(0, 2, room=92),)
    cache = SlotCache(2, 300, budget=100, block_size=4)
    sequence(cache, 0, list(range(200)))
    sequence(cache, 1, list(range(1000, 1200)))
    cache.free(1)
    cache.take_moves()
    sequence(cache, 2, [0, 1, *range(500, 590)])
    assert cache.take_moves() == (Copy(0, 1, 2, room=92), Drop(1, 2, room=92))


def test_memory_of_who_ends_or_is_forgotten_is_given_back() -> None:
    cache = SlotCache(2, 100, budget=3, block_size=10)
    sequence(cache, 0, list(range(20)))
    cache.free(0)
    assert cache.take_moves() == (Drop(0, 20),)
    sequence(cache, 1, list(range(50, 65)))  # for its second block the other goes
    assert cache.take_moves() == (Drop(0, 0),)
    cache.free(1, valid=False)
    assert cache.take_moves() == (Drop(1, 0),)


def test_another_salt_shares_nothing() -> None:
    cache = SlotCache(2, 100, budget=50)
    sequence(cache, 0, [1, 2, 3], salt=b"a")
    cache.free(0)
    assert sequence(cache, 1, [1, 2, 3], salt=b"b") == 0


def test_without_reuse_nothing_is_kept() -> None:
    cache = SlotCache(2, 100, budget=50, reuse=False)
    sequence(cache, 0, [1, 2, 3])
    cache.free(0)
    assert cache.used_blocks == 0
    assert sequence(cache, 1, [1, 2, 3]) == 0


def test_what_was_written_by_a_step_that_failed_is_forgotten() -> None:
    cache = SlotCache(2, 100, budget=50)
    sequence(cache, 0, [1, 2, 3])
    cache.free(0, valid=False)
    assert sequence(cache, 1, [1, 2, 3]) == 0
