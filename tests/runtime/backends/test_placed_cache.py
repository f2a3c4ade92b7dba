"""Slots that change their rows, against a list of tokens for each: their content and memory."""

from __future__ import annotations

import mmap
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from vlmforge.backends import DecoderBatch, dense
from vlmforge.backends.dense import PlacedCache
from vlmforge.engine.manifest import KVLayout
from vlmforge.kv.cache import Copy, Drop

KEPT = 4 * mmap.PAGESIZE
HEADS, WIDTH = 2, 64  # 16 tokens of a head are a page
LAYOUT = KVLayout(layers=1, kv_heads=HEADS, head_dim=WIDTH, dtype="float32", page_size=None)
# Each region of a head may begin and end within a page that cannot go back.
AT_EDGES = 2 * 2 * (HEADS + 1) * mmap.PAGESIZE


@dataclass
class Slots:
    """The cache, and beside it what each slot holds, of tokens that are all different."""

    count: int
    capacity: int
    tokens: dict[int, list[int]] = field(init=False)
    most: dict[int, int] = field(init=False)
    """Tokens that each slot may hold memory for, as far as it was told."""

    def __post_init__(self) -> None:
        self.cache = PlacedCache(LAYOUT, self.count, self.capacity)
        self.tokens = {slot: [] for slot in range(self.count)}
        self.most = dict.fromkeys(self.tokens, 0)
        self._last = 0

    def step(self, slots: list[int], past: list[int], new: int, *, fails: bool = False) -> None:
        """What a graph does: it writes the new tokens into rows side by side."""
        ids = np.zeros((len(slots), new), np.int64)
        zeros = np.zeros((len(slots), 1), np.int64)
        batch = DecoderBatch(tuple(slots), ids, np.array(past), None, zeros)
        first, order = self.cache.arrange(batch)
        places = np.arange(len(slots))[order].tolist()
        rows = [array for _, array in self.cache.rows(first, len(slots))]
        for row, place in enumerate(places):
            slot, begin = slots[place], past[place]
            given = list(range(self._last + 1, self._last + 1 + new))
            self._last += new
            for number, array in enumerate(rows):
                array[row, :, begin : begin + new] = values(given, number)
            self.tokens[slot] = self.tokens[slot][:begin] + ([] if fails else given)
            self.most[slot] = max(self.most[slot], begin + new)
        for slot in slots if fails else ():
            self.drop(slot, 0)

    def copy(self, source: int, target: int, tokens: int, room: int = 0) -> None:
        self.cache.move(Copy(source, target, tokens, room))
        self.tokens[target] = self.tokens[source][:tokens]
        self.most[target] = max(tokens, room)

    def drop(self, slot: int, tokens: int, room: int = 0) -> None:
        self.cache.move(Drop(slot, tokens, room))
        self.tokens[slot] = self.tokens[slot][:tokens]
        self.most[slot] = max(tokens, room)

    def restore(self, source: int, target: int, tokens: int) -> None:
        """Write what another slot holds, as a saved session does."""
        self.cache.write((target,), self.cache.read((source,), tokens), 0)
        self.tokens[target] = self.tokens[source][:tokens]
        self.most[target] = max(self.most[target], tokens)

    def check(self) -> None:
        for slot, tokens in self.tokens.items():
            for number, found in enumerate(self.cache.read((slot,), len(tokens)).values()):
                np.testing.assert_array_equal(found, values(tokens, number))
            assert self.behind(slot) <= dense._KEPT_BYTES + AT_EDGES

    def behind(self, slot: int) -> int:
        """Bytes that are not 0 behind what a slot may hold memory for."""
        row = self.cache._rows.row(slot)
        arrays = [array[0, :, self.most[slot] :] for _, array in self.cache.rows(row, 1)]
        return sum(4 * np.count_nonzero(array) for array in arrays)


def values(tokens: list[int], tensor: int) -> np.ndarray:
    """What a tensor has of some tokens: nowhere 0."""
    by_head = np.arange(HEADS, dtype=np.float32)[:, None, None] / 4 + tensor / 8
    return np.asarray(tokens, np.float32)[:, None] + by_head + np.zeros(WIDTH, np.float32)


def act(slots: Slots, rng: random.Random) -> None:
    """One of the things that happen to a cache, to any of its slots."""
    slot, other = rng.randrange(slots.count), rng.randrange(slots.count)
    held = len(slots.tokens[slot])
    what = rng.choice(["step", "step", "step", "fail", "copy", "drop", "restore"])
    if what in ("step", "fail"):
        new = rng.choice([1, 1, 1, 17, 100])
        beside = rng.sample(range(slots.count), rng.choice([0, 0, rng.randrange(slots.count)]))
        past = {name: len(slots.tokens[name]) for name in {*beside, slot}}
        if rng.random() < 0.2:  # a new owner of the slot, of whose last one nothing went
            past[slot] = rng.randint(0, held)
        those = [name for name in past if past[name] + new <= slots.capacity]
        rng.shuffle(those)
        if those:
            slots.step(those, [past[name] for name in those], new, fails=what == "fail")
    elif what == "drop":
        slots.drop(slot, rng.choice([0, held // 2, held]), rng.choice([0, slots.capacity // 2]))
    elif other != slot and held and what == "copy":
        slots.copy(slot, other, rng.randint(1, held), rng.choice([0, slots.capacity // 2]))
    elif other != slot and held:
        slots.restore(slot, other, rng.randint(1, held))


@pytest.mark.parametrize("kept", [0, KEPT])
@pytest.mark.parametrize("seed", range(6))
def test_any_history_keeps_content_and_gives_memory_back(
    seed: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_KEPT_BYTES", kept)
    rng = random.Random(seed)
    slots = Slots(rng.choice([1, 2, 4, 6, 9]), rng.choice([40, 256, 300]))
    for _ in range(300):
        act(slots, rng)
        slots.check()


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Slots:
    """Of 7 slots the first holds 20 tokens, and the last is full."""
    monkeypatch.setattr(dense, "_KEPT_BYTES", KEPT)
    slots = Slots(7, 256)
    slots.step([0], [0], 20)
    slots.step([6], [0], 256)
    return slots


@pytest.mark.parametrize("copied", [True, False])
def test_the_memory_of_tokens_that_are_about_to_come_stays(slots: Slots, copied: bool) -> None:
    if copied:
        slots.copy(0, 6, 1, room=128)
    else:
        slots.drop(6, 0, room=128)
    slots.check()
    before = 128 - copied  # what is behind the copied token
    left = slots.behind(6) + before * HEADS * WIDTH * 4 * 2
    slots.most[6] = int(copied)
    assert left - AT_EDGES <= slots.behind(6) <= left


def test_memory_that_was_kept_goes_when_the_tokens_come_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside those that run: another slot lies in front of it then."""
    monkeypatch.setattr(dense, "_KEPT_BYTES", KEPT)
    slots = Slots(3, 256)
    for slot, tokens in ((0, 10), (1, 40), (2, 256)):
        slots.step([slot], [0], tokens)
    for slot, tokens in ((1, 40), (2, 256)):
        slots.drop(slot, tokens)
    slots.step([0], [10], 1)
    slots.drop(2, 0, room=256)
    row = slots.cache._rows.row(2)
    slots.step([2], [0], 256)
    assert slots.cache._rows.row(1) == row
    slots.check()


@pytest.mark.parametrize("latest", [0, 3, 6])
def test_what_a_copy_takes_the_place_of_goes(slots: Slots, latest: int) -> None:
    """Wherever it was put: beside `latest`, or where it lay. The bookkeeping counts it no more."""
    slots.step([latest], [0], 1)
    slots.copy(0, 6, 1)
    slots.check()


def test_what_a_step_wrote_before_it_failed_goes(slots: Slots) -> None:
    slots.step([3], [0], 256, fails=True)
    slots.check()


def test_what_a_shorter_sequence_does_not_reach_goes_with_it(slots: Slots) -> None:
    """One that takes over a slot, and nothing was dropped then: both lay in one block."""
    slots.step([6], [0], 1)
    slots.drop(6, 0)
    slots.step([2, 5], [0, 0], 256)
    slots.step([2, 5], [0, 0], 1)
    slots.drop(2, 0)
    slots.drop(5, 0)
    slots.check()


def test_what_goes_little_by_little_goes(slots: Slots) -> None:
    for tokens in range(240, -1, -8):
        slots.drop(6, tokens)
        slots.check()
