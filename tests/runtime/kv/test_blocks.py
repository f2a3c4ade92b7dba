"""Blocks: every one accounted for at every moment, prefixes found as by brute force."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conftest import examples
from vlmforge.kv.blocks import BlockPool

BLOCK = 4


class Pool(RuleBasedStateMachine):
    """Sequences that begin, grow, fork and end, with their tokens kept in plain lists beside."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, BLOCK)
        self.content: dict[int, list[int]] = {}  # written
        self.stored: dict[tuple[int, int], tuple[int, ...]] = {}  # block, place: its whole prefix
        self.next_id = 0

    @rule(keys=st.lists(st.integers(0, 1), min_size=1, max_size=30))
    def begin(self, keys: list[int]) -> None:
        before = self.pool.free_blocks
        cached = self.pool.begin(self.next_id, np.array(keys), salt=b"", reuse=True)
        if cached is None:
            assert self.pool.free_blocks == before
            return
        assert cached < len(keys)
        assert cached % BLOCK == 0
        self.content[self.next_id] = keys[:cached]
        self.check(self.next_id)
        self.next_id += 1

    @precondition(lambda self: self.content)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        request = data.draw(st.sampled_from(sorted(self.content)))
        written = self.content[request]
        if not self.pool.grow(request, len(written) + len(more)):
            return
        for copy in self.pool.take_moves():
            for place in range(copy.tokens):
                self.stored[copy.target, place] = self.stored[copy.source, place]
        for token in more:
            block = self.pool.place(request)[len(written) // BLOCK]
            assert self.pool.uses(block) == 1
            written.append(token)
            self.stored[block, (len(written) - 1) % BLOCK] = tuple(written)
        self.pool.note(request, np.array(more))
        self.check(request)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.content)))
        written = self.content[parent]
        shared = written[: data.draw(st.integers(0, len(written)))]
        there = self.pool.free_blocks > 0
        assert self.pool.fork(parent, self.next_id, np.array(shared, np.int64)) is there
        if not there:
            return
        self.content[self.next_id] = list(shared)
        self.check(self.next_id)
        self.next_id += 1

    @precondition(lambda self: self.content)
    @rule(data=st.data(), valid=st.booleans())
    def end(self, data: st.DataObject, valid: bool) -> None:
        request = data.draw(st.sampled_from(sorted(self.content)))
        self.pool.free(request, valid=valid)
        del self.content[request]

    def check(self, request: int) -> None:
        """What its blocks hold is what was written to it."""
        written, blocks = self.content[request], self.pool.place(request)
        for place in range(len(written)):
            held = self.stored[blocks[place // BLOCK], place % BLOCK]
            assert held == tuple(written[: place + 1])

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        uses = Counter(block for request in self.content for block in self.pool.place(request))
        assert all(self.pool.uses(block) == uses[block] for block in range(self.pool.blocks))
        assert self.pool.free_blocks == self.pool.blocks - len(uses)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=examples(60), stateful_step_count=40)

SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=8)


@given(SEQUENCES, st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_prefixes_are_found_as_by_brute_force(past: list[list[int]], asked: list[int]) -> None:
    pool = BlockPool(100, BLOCK)
    for request, keys in enumerate(past):
        cached = pool.begin(request, np.array(keys), salt=b"", reuse=True)
        assert cached is not None
        pool.grow(request, len(keys))
        pool.note(request, np.array(keys[cached:]))
        if request % 2:
            pool.free(request)
    common = max(sum(1 for n in range(1, len(asked) + 1) if asked[:n] == keys[:n]) for keys in past)
    place, tokens = pool.find(np.array(asked), salt=b"")
    assert tokens == common // BLOCK * BLOCK == len(place) * BLOCK
    assert pool.find(np.array(asked), salt=b"x") == ((), 0)
    expected = min(common, len(asked) - 1) // BLOCK * BLOCK
    assert pool.begin(99, np.array(asked), salt=b"", reuse=True) == expected
    assert pool.begin(98, np.array(asked), salt=b"other", reuse=True) == 0
    assert pool.begin(97, np.array(asked), salt=b"", reuse=False) == 0


def test_the_least_recently_used_content_goes_first() -> None:
    pool = BlockPool(4, BLOCK)
    first, second = np.zeros(9, np.int64), np.ones(9, np.int64)
    for request, keys in enumerate((first, second)):
        pool.begin(request, keys[:8], salt=b"", reuse=True)
        pool.grow(request, 8)
        pool.note(request, keys[:8])
    pool.free(0)
    pool.free(1)
    assert pool.begin(2, first, salt=b"", reuse=True) == 8  # now the second is the older one
    assert pool.grow(2, 9)
    pool.free(2)
    assert pool.begin(3, second, salt=b"", reuse=True) == 4  # its last block went
    pool.free(3)
    assert pool.begin(4, first, salt=b"", reuse=True) == 8


def test_a_forked_sequence_shares_until_it_writes() -> None:
    pool = BlockPool(3, BLOCK)
    keys = np.arange(6)
    pool.begin(0, keys, salt=b"", reuse=True)
    pool.grow(0, 6)
    pool.note(0, keys)
    assert pool.fork(0, 1, keys)
    assert pool.place(0) == pool.place(1)
    assert pool.free_blocks == 1
    assert pool.grow(1, 7)
    (copy,) = pool.take_moves()
    assert (copy.source, copy.target, copy.tokens) == (pool.place(0)[1], pool.place(1)[1], 2)
    assert pool.place(0)[0] == pool.place(1)[0]
    assert pool.grow(0, 7)
    assert not pool.take_moves()
    assert not pool.grow(1, 9)  # the pool is full
