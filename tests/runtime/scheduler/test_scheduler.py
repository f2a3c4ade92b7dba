"""Generated histories: whatever runs beside a sequence, its tokens are those that it has alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from token_store import BlockStore, SlotStore, Store, alone, next_token
from vlmforge.kv.blocks import BlockPool
from vlmforge.kv.cache import KVCache
from vlmforge.kv.slots import SlotCache
from vlmforge.runner.step import Step, StepResult
from vlmforge.scheduler.scheduler import Scheduler
from vlmforge.scheduler.sequence import State, TokenSequence

LONGEST = 72


@dataclass
class Asked:
    """A sequence of a history: when it comes, and when it is cancelled, in steps."""

    prompt: list[int]
    count: int
    arrival: int = 0
    cancelled: int | None = None
    priority: int = 0
    salt: bytes = b""


@dataclass
class World:
    """Runs the steps of a scheduler on a store of token ids."""

    scheduler: Scheduler
    cache: KVCache
    store: Store
    sequences: dict[int, TokenSequence] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    log: list[Step] = field(default_factory=list)

    def add(self, asked: Asked) -> TokenSequence:
        sequence = TokenSequence(
            len(self.sequences),
            list(asked.prompt),
            np.array(asked.prompt),
            asked.salt,
            asked.priority,
        )
        self.sequences[sequence.id], self.counts[sequence.id] = sequence, asked.count
        self.scheduler.add(sequence)
        return sequence

    def step(self, fail: frozenset[int] = frozenset()) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            return False
        self.log.append(step)
        self.store.move(step.moves)
        tokens: dict[int, int | None] = {}
        for row in step.rows:
            sequence = self.sequences[row.sequence]
            assert list(row.tokens) == sequence.tokens[row.start : row.stop]
            self.store.write(row.place, row.start, row.tokens)
            if row.logits == "none" or row.sequence in fail:
                continue
            left = self.counts[row.sequence] - (len(sequence.tokens) - sequence.prompt_length)
            token = next_token(self.store.read(row.place, row.stop))
            if left == 1:
                sequence.append(token)  # it is part of the answer, and will not be run
            tokens[row.sequence] = None if left == 1 else token
        failed = [row.sequence for row in step.rows if row.sequence in fail]
        self.scheduler.update(step, StepResult(tokens, frozenset(failed)))
        return True

    def answer(self, sequence: TokenSequence) -> list[int]:
        return sequence.tokens[sequence.prompt_length :]


def slots(rows: int, budget: int, block: int, *, reuse: bool = True) -> tuple[KVCache, Store]:
    cache = SlotCache(rows, LONGEST, budget=budget, block_size=block, reuse=reuse)
    return cache, SlotStore(rows, LONGEST)


def blocks(_: int, budget: int, block: int, *, reuse: bool = True) -> tuple[KVCache, Store]:
    cache = BlockPool(budget, block)
    return cache, BlockStore(cache)


# Few different tokens, so that prompts share beginnings.
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=40)
ASKED = st.builds(
    Asked,
    PROMPTS,
    st.integers(1, 30),
    st.integers(0, 30),
    st.none() | st.integers(0, 60),
    st.integers(0, 2),
    st.sampled_from([b"", b"salt"]),
)
# As few blocks as can hold the longest sequence: who comes last loses its place all the time.
SIZES = st.tuples(st.integers(1, 5), st.integers(0, 20), st.integers(1, 9), st.integers(1, 50))


@given(st.lists(ASKED, min_size=1, max_size=10), SIZES, st.sampled_from([slots, blocks]))
@settings(max_examples=120)
def test_histories(history: list[Asked], sizes: tuple[int, int, int, int], make: object) -> None:
    rows, spare, block, chunk = sizes
    cache, store = make(rows, -(-LONGEST // block) + spare, block)  # type: ignore[operator]
    world = World(Scheduler(cache, rows=rows, chunk=chunk), cache, store)
    coming = sorted(history, key=lambda asked: asked.arrival)
    placed: list[tuple[Asked, TokenSequence]] = []
    time = 0
    while coming or world.scheduler.running or world.scheduler.waiting:
        while coming and coming[0].arrival <= time:
            asked = coming.pop(0)
            placed.append((asked, world.add(asked)))
        for asked, sequence in placed:
            if asked.cancelled is not None and asked.cancelled <= time:
                world.scheduler.remove(sequence)
        busy = world.scheduler.running or world.scheduler.waiting
        assert world.step() or not busy
        time += 1
        assert time < 20_000
    for asked, sequence in placed:
        assert sequence.state is State.ENDED
        whole = alone(asked.prompt, asked.count)
        answer = world.answer(sequence)
        assert answer == whole[: len(answer)]
        assert answer == whole or asked.cancelled is not None


@given(st.lists(ASKED, min_size=2, max_size=6), st.data(), st.sampled_from([slots, blocks]))
@settings(max_examples=60)
def test_what_fails_takes_nobody_along(
    history: list[Asked], data: st.DataObject, make: object
) -> None:
    cache, store = make(3, 30, 4)  # type: ignore[operator]
    world = World(Scheduler(cache, rows=3, chunk=7), cache, store)
    placed = [(asked, world.add(asked)) for asked in history]
    bad = data.draw(st.sets(st.sampled_from([sequence.id for _, sequence in placed])))
    when = data.draw(st.integers(0, 20))
    while world.scheduler.running or world.scheduler.waiting:
        assert world.step(frozenset(bad) if len(world.log) >= when else frozenset())
    for asked, sequence in placed:
        answer = world.answer(sequence)
        whole = alone(asked.prompt, asked.count)
        assert answer == whole or (sequence.id in bad and answer == whole[: len(answer)])


def test_first_come_first_served_within_a_priority() -> None:
    cache, store = slots(1, 100, 8)
    world = World(Scheduler(cache, rows=1, chunk=8), cache, store)
    for priority in (0, 1, 0, 1):
        world.add(Asked([1, 2], 2, priority=priority))
    ended: list[int] = []
    while world.step():
        ended += [
            i for i, r in world.sequences.items() if r.state is State.ENDED and i not in ended
        ]
    assert ended == [1, 3, 0, 2]


def test_a_higher_priority_takes_a_place_and_gives_it_back() -> None:
    cache, store = slots(1, 100, 8)
    world = World(Scheduler(cache, rows=1, chunk=8), cache, store)
    low = world.add(Asked([1, 2, 0], 20))
    for _ in range(6):
        world.step()
    high = world.add(Asked([2, 2], 3, priority=1))
    world.step()
    assert (low.state, high.state) == (State.WAITING, State.RUNNING)
    while world.step():
        pass
    assert low.preempted == 1
    assert world.answer(low) == alone([1, 2, 0], 20)
    assert world.answer(high) == alone([2, 2], 3)


def test_what_a_preempted_sequence_had_is_found_again() -> None:
    """Its own tokens are the first thing that it can reuse, if nobody needed the room."""
    cache, store = slots(2, 100, 8)
    world = World(Scheduler(cache, rows=1, chunk=8), cache, store)
    low = world.add(Asked([1, 2, 0], 20))
    for _ in range(6):
        world.step()
    had = low.computed
    world.add(Asked([2, 2], 3, priority=1))
    world.step()
    assert low.state is State.WAITING
    while low.state is State.WAITING:
        world.step()
    assert low.cached == had


def test_decoding_goes_on_while_a_long_prompt_is_run() -> None:
    cache, store = slots(2, 100, 8)
    world = World(Scheduler(cache, rows=2, chunk=4), cache, store)
    world.add(Asked([1], 30))
    world.step()
    world.add(Asked([2] * 40, 2))
    for _ in range(10):
        world.step()
    beside = [step for step in world.log if step.prefill is not None and step.decode]
    assert len(beside) == 10
    assert all(step.prefill.stop - step.prefill.start == 4 for step in beside if step.prefill)
