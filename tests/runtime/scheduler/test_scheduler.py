"""Generated histories: whatever runs beside a sequence, its tokens are those that it has alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from token_store import VOCAB, BlockStore, SlotStore, Store, alone, answers_alone, next_token
from vlmforge.kv.blocks import BlockPool
from vlmforge.kv.cache import Copy, KVCache
from vlmforge.kv.slots import SlotCache
from vlmforge.runner.step import Step, StepResult
from vlmforge.scheduler.scheduler import Scheduler
from vlmforge.scheduler.sequence import State, TokenSequence
from vlmforge.scheduler.together import Together

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
    n: int = 1

    def answers(self) -> list[list[int]]:
        return answers_alone(self.prompt, self.count, self.n)


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
        for number in range(1, asked.n):
            sequence.fork(sequence.id + number)
        for answer in (sequence, *sequence.forks):
            self.sequences[answer.id], self.counts[answer.id] = answer, asked.count
        self.scheduler.add(sequence)
        return sequence

    def step(self, fail: frozenset[int] = frozenset()) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            return False
        self.log.append(step)
        self.store.move(step.moves)
        tokens: dict[int, int | None] = {}
        assert len({row.sequence for row in step.rows}) == len(step.rows)
        for row in step.rows:
            sequence = self.sequences[row.sequence]
            assert list(row.tokens) == sequence.tokens[row.start : row.stop]
            self.store.write(row.place, row.start, row.tokens)
            if row.logits == "none" or row.sequence in fail:
                continue
            token = next_token(self.store.read(row.place, row.stop))
            for number, name in enumerate((row.sequence, *row.forks)):
                chosen = (token + number) % VOCAB
                left = self.counts[name] - len(self.answer(self.sequences[name]))
                if left == 1:  # it is part of the answer, and will not be run
                    self.sequences[name].append(chosen)
                tokens[name] = None if left == 1 else chosen
        failed = [row.sequence for row in step.rows if row.sequence in fail]
        self.scheduler.update(step, StepResult(tokens, frozenset(failed)))
        return True

    def answer(self, sequence: TokenSequence) -> list[int]:
        return sequence.tokens[sequence.prompt_length :]


def slots(rows: int, budget: int, block: int, *, reuse: bool = True) -> tuple[KVCache, Store]:
    cache = SlotCache(rows, LONGEST, budget=budget, block_size=block, reuse=reuse)
    return cache, SlotStore(rows, LONGEST)


def blocks(_: int, budget: int, block: int, *, reuse: bool = True) -> tuple[KVCache, Store]:
    cache = BlockPool(budget, block, reuse=reuse)
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
    st.integers(1, 4),
)
# As few blocks as can hold the longest sequence: who comes last loses its place all the time.
SIZES = st.tuples(st.integers(1, 5), st.integers(0, 20), st.integers(1, 9), st.integers(1, 50))


@given(
    st.lists(ASKED, min_size=1, max_size=10),
    SIZES,
    st.sampled_from([slots, blocks]),
    st.booleans(),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([(False, False), (True, False), (True, True)]),
)
@settings(max_examples=examples(120))
def test_histories(
    history: list[Asked],
    sizes: tuple[int, int, int, int],
    make: object,
    reuse: bool,
    prompts: int,
    kind: tuple[bool, bool],
) -> None:
    (rows, spare, block, chunk), (packs, apart) = sizes, kind
    cache, store = make(rows, -(-LONGEST // block) + spare, block, reuse=reuse)  # type: ignore[operator]
    together = Together(chunk, prompts, packs, LONGEST, apart)
    scheduler = Scheduler(cache, rows=rows, chunk=chunk, together=together)
    world = World(scheduler, cache, store)
    coming = sorted(history, key=lambda asked: asked.arrival)
    placed: list[tuple[Asked, list[TokenSequence]]] = []
    time = 0
    while coming or world.scheduler.running or world.scheduler.waiting:
        while coming and coming[0].arrival <= time:
            asked = coming.pop(0)
            sequence = world.add(asked)
            placed.append((asked, [sequence, *sequence.forks]))
        for asked, sequences in placed:
            for sequence in sequences if asked.cancelled in range(time + 1) else ():
                world.scheduler.remove(sequence)
        busy = world.scheduler.running or world.scheduler.waiting
        assert world.step() or not busy
        time += 1
        assert time < 20_000
    for step in world.log:
        widths = [len(row.tokens) for row in step.prompts]
        assert len(widths) <= prompts
        if packs:
            most = chunk if apart else max(1, chunk // 2, chunk - len(step.decode))
            assert sum(widths) <= most
            continue
        assert len(widths) * max(widths, default=0) <= chunk
        assert max((row.start for row in step.together), default=0) + max(widths, default=0) <= 72
    for asked, sequences in placed:
        for sequence, whole in zip(sequences, asked.answers(), strict=True):
            assert sequence.state is State.ENDED
            answer = world.answer(sequence)
            assert answer == whole[: len(answer)]
            assert answer == whole or asked.cancelled is not None


@given(st.lists(ASKED, min_size=2, max_size=6), st.data(), st.sampled_from([slots, blocks]))
@settings(max_examples=examples(60))
def test_what_fails_takes_nobody_along(
    history: list[Asked], data: st.DataObject, make: object
) -> None:
    cache, store = make(3, 30, 4)  # type: ignore[operator]
    world = World(Scheduler(cache, rows=3, chunk=7), cache, store)
    placed = [(asked, world.add(asked)) for asked in history]
    bad = data.draw(st.sets(st.sampled_from(sorted(world.sequences))))
    when = data.draw(st.integers(0, 20))
    while world.scheduler.running or world.scheduler.waiting:
        assert world.step(frozenset(bad) if len(world.log) >= when else frozenset())
    for asked, first in placed:
        for number, whole in enumerate(asked.answers()):
            sequence = world.sequences[first.id + number]
            answer, without = world.answer(sequence), not world.answer(first)
            failed = sequence.id in bad or (first.id in bad and without)  # before they parted
            assert answer == whole or (failed and answer == whole[: len(answer)])


@pytest.mark.parametrize("make", [slots, blocks])
def test_other_answers_to_a_prompt_have_places_before_who_came_later(make: object) -> None:
    """Without a place they would run the prompt again, where nothing is kept."""
    cache, store = make(4, 100, 8, reuse=False)  # type: ignore[operator]
    together = Together(64, 4, packs=True, apart=True)
    world = World(Scheduler(cache, rows=4, chunk=64, together=together), cache, store)
    for prompt, n in (([1, 2] * 9, 3), ([0, 1], 1), ([2, 1], 1)):
        world.add(Asked(prompt, 3, n=n))
    while world.step():
        pass
    prompts = [[(row.sequence, len(row.tokens)) for row in step.prompts] for step in world.log]
    assert prompts == [[(0, 18), (3, 2)], [], [], [(4, 2)], [], []]


def test_a_higher_priority_leaves_no_place_for_other_answers() -> None:
    cache, store = slots(2, 100, 8)
    together = Together(16, 2, packs=True, apart=True)
    world = World(Scheduler(cache, rows=2, chunk=16, together=together), cache, store)
    world.add(Asked([1, 2] * 9, 3, n=2))
    world.step()
    world.add(Asked([2, 1], 2, priority=1))
    world.step()
    assert [row.sequence for row in world.log[-1].prompts] == [0, 2]


def test_who_decodes_takes_no_room_of_prompts_that_run_apart() -> None:
    cache, store = slots(3, 100, 8)
    together = Together(16, 3, packs=True, apart=True)
    world = World(Scheduler(cache, rows=3, chunk=16, together=together), cache, store)
    world.add(Asked([1], 20))
    world.step()
    world.add(Asked([2] * 16, 2))
    world.step()
    assert [len(row.tokens) for row in world.log[-1].prompts] == [16]


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


@pytest.mark.parametrize("make", [slots, blocks])
@pytest.mark.parametrize("reuse", [True, False])
def test_answers_share_their_prompt(make: object, reuse: bool) -> None:
    """It is run once, and then all of them decode together."""
    cache, store = make(4, 100, 8, reuse=reuse)  # type: ignore[operator]
    world = World(Scheduler(cache, rows=4, chunk=64), cache, store)
    world.add(Asked([1, 2] * 9, 6, n=4))
    while world.step():
        pass
    assert sum(len(row.tokens) for step in world.log for row in step.rows) == 18 + 4 * 5
    assert [len(step.rows) for step in world.log] == [1, 4, 4, 4, 4, 4]
    copied = [move.tokens for step in world.log for move in step.moves if isinstance(move, Copy)]
    assert copied == ([18] * 3 if make is slots else [2] * 3)  # of a pool, what will be written to


@pytest.mark.parametrize("make", [slots, blocks])
def test_answers_part_before_the_first_one_ends(make: object) -> None:
    """It may end with its first token, and where nothing is kept its prompt goes with it."""
    cache, store = make(3, 100, 8, reuse=False)  # type: ignore[operator]
    world = World(Scheduler(cache, rows=3, chunk=64), cache, store)
    asked = Asked([1, 2] * 9, 6, n=3)
    first = world.add(asked)
    world.counts[first.id] = 1
    while world.step():
        pass
    answers = [world.answer(world.sequences[i]) for i in range(3)]
    assert answers == [asked.answers()[0][:1], *asked.answers()[1:]]
    assert sum(len(row.tokens) for step in world.log for row in step.rows) == 18 + 2 * 5


def test_answers_without_places_of_their_own_follow() -> None:
    cache, store = slots(1, 100, 8)
    world = World(Scheduler(cache, rows=1, chunk=64), cache, store)
    asked = Asked([1, 2] * 9, 6, n=3)
    world.add(asked)
    late = world.add(Asked([2, 2], 3))
    while late.state is State.WAITING:
        world.step()
    assert [world.answer(world.sequences[i]) for i in range(3)] == asked.answers()
    assert sum(len(row.tokens) for step in world.log[:-1] for row in step.rows) == 18 + 3 * 5


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


def test_prompts_are_run_together_as_far_as_a_chunk_goes() -> None:
    cache, store = blocks(8, 100, 8)
    world = World(Scheduler(cache, rows=8, chunk=12, together=Together(12, 8)), cache, store)
    for prompt in ([1, 2, 3], [4, 5], [6] * 20, [7]):
        world.add(Asked(prompt, 2))
    while world.step():
        pass
    parts = [[(row.sequence, row.start, row.stop) for row in step.prompts] for step in world.log]
    # None is cut for another; the long one runs alone.
    assert parts[:4] == [[(0, 0, 3), (1, 0, 2)], [(2, 0, 12)], [(2, 12, 20)], [(3, 0, 1)]]
    assert [world.answer(world.sequences[i]) for i in range(4)] == [
        alone(prompt, 2) for prompt in ([1, 2, 3], [4, 5], [6] * 20, [7])
    ]


@pytest.mark.parametrize("reuse", [True, False])
def test_who_begins_as_another_waits_for_what_the_cache_will_have(reuse: bool) -> None:
    """Where nothing is kept, there is nothing to wait for."""
    cache, store = blocks(4, 100, 8, reuse=reuse)
    world = World(Scheduler(cache, rows=4, chunk=512, together=Together(512, 4)), cache, store)
    for last in (1, 2, 3):
        world.add(Asked([0] * 70 + [last], 2))
    while world.step():
        pass
    prompts = [[len(row.tokens) for row in step.prompts] for step in world.log]
    # Of the others, all but what the first one left.
    assert prompts == ([[71], [7, 7], []] if reuse else [[71, 71, 71], []])


@pytest.mark.parametrize(("fail", "start"), [(frozenset({0}), 0), (frozenset[int](), 16)])
def test_what_a_failed_step_may_have_written_is_forgotten(fail: frozenset[int], start: int) -> None:
    cache, store = blocks(4, 100, 8)
    world = World(Scheduler(cache, rows=4, chunk=512), cache, store)
    world.add(Asked([1] * 20, 2))
    world.step()
    world.step(fail)
    world.add(Asked([1] * 20, 2))
    world.step()
    prompt = world.log[-1].prefill
    assert prompt is not None and prompt.start == start


def test_nobody_loses_a_place_for_a_prompt_that_is_run_beside_another() -> None:
    cache, store = blocks(4, 4, 8)
    world = World(Scheduler(cache, rows=4, chunk=64, together=Together(64, 4)), cache, store)
    for token in (1, 2, 3):
        world.add(Asked([token] * 15, 2))
    while world.step():
        pass
    assert [sequence.preempted for sequence in world.sequences.values()] == [0, 0, 0]
    assert [len(step.prompts) for step in world.log] == [2, 0, 1, 0]


@pytest.mark.parametrize(("window", "prompts"), [(24, [2]), (23, [1, 1])])
def test_none_is_filled_up_beyond_the_window(window: int, prompts: list[int]) -> None:
    """One goes on behind 16 tokens that are there, and another has 8."""
    cache, store = blocks(2, 100, 8)
    world = World(
        Scheduler(cache, rows=2, chunk=64, together=Together(64, 2, window=window)), cache, store
    )
    world.add(Asked([1] * 16, 1))
    world.step()
    world.add(Asked([1] * 16 + [2], 1))
    world.add(Asked([3] * 8, 1))
    while world.step():
        pass
    assert [len(step.prompts) for step in world.log[1:]] == prompts
