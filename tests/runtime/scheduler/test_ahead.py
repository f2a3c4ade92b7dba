"""Steps that are planned while the one before them runs: the same answers, and no block is lost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from token_store import VOCAB, BlockStore, SlotStore, Store, answers_alone, next_token
from vlmforge.kv.blocks import BlockPool
from vlmforge.kv.cache import KVCache
from vlmforge.kv.slots import SlotCache
from vlmforge.runner.step import AHEAD, Step, StepResult
from vlmforge.scheduler.scheduler import Scheduler
from vlmforge.scheduler.sequence import State, TokenSequence
from vlmforge.scheduler.together import Together

LONGEST = 64


@dataclass
class Asked:
    """A sequence of a history; `known`: its end is foreseen, as that by its budget is."""

    prompt: list[int]
    count: int
    arrival: int = 0
    cancelled: int | None = None
    priority: int = 0
    n: int = 1
    known: bool = True

    def answers(self) -> list[list[int]]:
        return answers_alone(self.prompt, self.count, self.n)


@dataclass
class Device:
    """Does what it is given in order, and only then knows the tokens of the step before."""

    store: Store
    tokens: dict[int, int] = field(default_factory=dict)
    log: list[Step] = field(default_factory=list)

    def begin(self, step: Step) -> dict[int, int]:
        self.log.append(step)
        self.store.move(step.moves)
        found = {}
        for row in step.rows:
            ids = (self.tokens[row.sequence],) if row.tokens == (AHEAD,) else row.tokens
            self.store.write(row.place, row.start, ids)
            if row.logits != "none":
                found[row.sequence] = next_token(self.store.read(row.place, row.stop))
        self.tokens = found
        return found


@dataclass
class World:
    """As the runtime: a step is planned behind one that runs wherever it can be."""

    scheduler: Scheduler
    device: Device
    undecided: int
    asked: dict[int, Asked] = field(default_factory=dict)
    sequences: dict[int, TokenSequence] = field(default_factory=dict)
    answers: dict[int, list[int]] = field(default_factory=dict)
    running: tuple[Step, dict[int, int]] | None = None
    taken: int = 0
    alone: set[int] = field(default_factory=set)  # whose next token is chosen on the host

    def add(self, asked: Asked) -> list[TokenSequence]:
        tokens, name = list(asked.prompt), len(self.sequences)
        first = TokenSequence(name, tokens, np.array(tokens), b"", asked.priority)
        for number in range(1, asked.n):
            first.fork(name + number)
        for answer in (first, *first.forks):
            self.sequences[answer.id], self.asked[answer.id] = answer, asked
            self.answers[answer.id] = []
        self.scheduler.add(first)
        return [first, *first.forks]

    def step(self) -> bool:
        begun = self.running is not None
        if self.running is None:
            step = self.scheduler.schedule()
            if step is None:
                return False
            self.running = step, self.device.begin(step)
        step, found = self.running
        self.running = None
        decoding = {row.sequence for row in step.decode}
        if not decoding & self.alone:
            under_way = {row.sequence for row in step.rows}
            forked = {row.sequence for row in step.rows if row.forks}  # chosen here for all
            able = [
                name
                for name in self.scheduler.behind(step)
                if name not in under_way or (name not in forked and self._goes_on(name))
            ]
            behind = self.scheduler.ahead(step, able)
            if behind is not None:
                self.running = behind, self.device.begin(behind)
        self.scheduler.update(step, self._result(step, found, begun=begun))
        return True

    def _goes_on(self, name: int) -> bool:
        left = self.asked[name].count - len(self.answers[name])
        return left > 1 or not self.asked[name].known

    def _result(self, step: Step, found: dict[int, int], *, begun: bool) -> StepResult:
        tokens: dict[int, int | None] = {}
        again = set()
        for row in step.rows:
            if row.logits == "none" or self.sequences[row.sequence].state is State.ENDED:
                continue
            self.taken += 1
            if row in step.decode and (
                row.sequence in self.alone or (self.running and not self.taken % self.undecided)
            ):
                if not begun and row.sequence in self.alone:
                    self.alone.discard(row.sequence)
                else:
                    self.alone.add(row.sequence)
                    again.add(row.sequence)
                    continue
            if row not in step.decode and self.running and not self.taken % self.undecided:
                self.alone.add(row.sequence)  # the device went on with a token of its own
            for number, name in enumerate((row.sequence, *row.forks)):
                token = (found[row.sequence] + number) % VOCAB
                self.answers[name].append(token)
                ends = len(self.answers[name]) == self.asked[name].count
                tokens[name] = None if ends else token
        return StepResult(tokens, again=frozenset(again))


def world(rows: int, spare: int, block: int, chunk: int, undecided: int, *, pool: bool) -> World:
    budget = -(-LONGEST // block) + spare
    cache: KVCache
    store: Store
    if pool:
        cache = made = BlockPool(budget, block)
        store = BlockStore(made)
    else:
        cache = SlotCache(rows, LONGEST, budget=budget, block_size=block)
        store = SlotStore(rows, LONGEST)
    together = Together(chunk, 3, packs=pool, window=LONGEST)
    scheduler = Scheduler(cache, rows=rows, chunk=chunk, together=together)
    return World(scheduler, Device(store), undecided)


ASKED = st.builds(
    Asked,
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
    st.integers(1, 30),
    st.integers(0, 30),
    st.none() | st.integers(0, 60),
    st.integers(0, 1),
    st.integers(1, 3),
    st.booleans(),
)
SIZES = st.tuples(st.integers(1, 5), st.integers(0, 20), st.integers(1, 9), st.integers(4, 50))


@given(st.lists(ASKED, min_size=1, max_size=8), SIZES, st.sampled_from([2, 7, 999]), st.booleans())
@settings(max_examples=examples(120))
def test_histories(
    history: list[Asked], sizes: tuple[int, int, int, int], undecided: int, pool: bool
) -> None:
    made = world(*sizes, undecided, pool=pool)
    scheduler, cache = made.scheduler, made.scheduler._cache
    coming = sorted(history, key=lambda asked: asked.arrival)
    placed: list[tuple[Asked, list[TokenSequence]]] = []
    time = 0
    while coming or made.running or scheduler.running or scheduler.waiting:
        while coming and coming[0].arrival <= time:
            placed.append((coming[0], made.add(coming.pop(0))))
        for asked, sequences in placed:
            for sequence in sequences if asked.cancelled in range(time + 1) else ():
                scheduler.remove(sequence)
        busy = made.running or scheduler.running or scheduler.waiting
        assert made.step() or not busy
        time += 1
        assert time < 20_000
    for asked, sequences in placed:
        for sequence, whole in zip(sequences, asked.answers(), strict=True):
            answer = made.answers[sequence.id]
            assert answer == whole[: len(answer)]
            assert answer == whole or asked.cancelled is not None
    if isinstance(cache, BlockPool):
        assert cache.free_blocks == cache.blocks
        assert not any(map(cache.uses, range(cache.blocks)))
    else:
        assert isinstance(cache, SlotCache)
        assert cache.held_blocks == 0


def test_who_ended_keeps_its_blocks_until_its_last_row_has_been_run() -> None:
    made = world(2, 30, 4, 64, 999, pool=True)
    first, second = made.add(Asked([1] * 4, 3, known=False)), made.add(Asked([2] * 4, 12))
    cache = made.scheduler._cache
    assert isinstance(cache, BlockPool)
    made.step()  # the prompts
    made.step()  # the second tokens, and behind them the third ones
    made.step()  # the third ones: the first ends, and there is a row of it behind
    assert first[0].state is State.ENDED
    held = [block for block in range(cache.blocks) if cache.uses(block)]
    assert len(held) == 2 * 2
    made.step()
    assert set(cache.place(second[0].id)) == {b for b in range(cache.blocks) if cache.uses(b)}


def test_an_end_that_is_foreseen_has_no_row_behind_it() -> None:
    made = world(2, 30, 4, 64, 999, pool=True)
    made.add(Asked([1] * 4, 3))
    made.add(Asked([2] * 4, 12))
    made.step()
    made.step()
    assert made.running is not None
    assert [row.sequence for row in made.running[0].decode] == [0, 1]
    made.step()
    assert [row.sequence for row in made.running[0].decode] == [1]


def test_a_prompt_that_comes_is_not_kept_waiting() -> None:
    """Behind what has been begun it is next, and its tokens come with the others'."""
    made = world(2, 30, 4, 64, 999, pool=True)
    made.add(Asked([1] * 4, 12))
    made.step()
    made.step()
    late = made.add(Asked([2] * 4, 3))
    made.step()
    assert made.running is not None
    step = made.running[0]
    assert step.prefill is not None and step.prefill.sequence == late[0].id
    assert [(row.sequence, row.tokens) for row in step.decode] == [(0, (AHEAD,))]
    made.step()
    assert len(made.answers[late[0].id]) == 1
    # Nobody knew its first token when the step behind it was begun: the device had it.
    assert [row.sequence for row in made.running[0].decode] == [0, late[0].id]
    assert [row.tokens for row in made.running[0].decode] == [(AHEAD,), (AHEAD,)]


def test_whose_first_token_is_chosen_here_runs_a_step_later() -> None:
    made = world(2, 30, 4, 64, 999, pool=True)
    made.add(Asked([1] * 4, 12))
    late = made.add(Asked([2] * 9, 3))
    step = made.scheduler.schedule()
    assert step is not None and {row.sequence for row in step.prompts} == {0, 1}
    behind = made.scheduler.ahead(step, {0})
    assert behind is not None
    assert [row.sequence for row in behind.decode] == [0]
    found = made.device.begin(step)
    made.scheduler.update(step, StepResult(dict(found)))
    last = made.scheduler.ahead(behind, {*made.scheduler.behind(behind)})
    assert last is not None
    assert [(row.sequence, row.tokens) for row in last.decode] == [
        (0, (AHEAD,)),
        (1, (found[late[0].id],)),
    ]


def test_who_may_run_behind_a_step() -> None:
    """All that decode, and those whose prompt ends with it: not the one of which more is left."""
    made = world(3, 60, 4, 4, 999, pool=True)
    made.add(Asked([1] * 3, 12))
    made.step()
    made.add(Asked([2] * 8, 12))
    step = made.scheduler.schedule() if made.running is None else made.running[0]
    assert step is not None
    assert [*made.scheduler.behind(step)] == [0]
    made.step()
    assert made.running is not None
    stops = []
    while (stop := made.running[0].prompts[0].stop) < 8:
        stops.append(stop)
        assert [*made.scheduler.behind(made.running[0])] == [0]
        made.step()
    assert stops == [3, 6]  # four tokens in all, one of them decoded
    assert [*made.scheduler.behind(made.running[0])] == [0, 1]


def test_a_higher_priority_that_comes_takes_its_place() -> None:
    made = world(1, 30, 4, 64, 999, pool=True)
    low = made.add(Asked([1] * 4, 12))
    for _ in range(3):
        made.step()
    high = made.add(Asked([2] * 4, 3, priority=1))
    made.step()
    made.step()
    assert (low[0].state, high[0].state) == (State.WAITING, State.RUNNING)


@pytest.mark.parametrize("pool", [True, False])
def test_answers_share_their_prompt(pool: bool) -> None:
    """It is run once, and the others part from it when nothing is under way that writes there."""
    made = world(4, 30, 8, 64, 999, pool=pool)
    asked = Asked([1, 2] * 9, 6, n=4)
    sequences = made.add(asked)
    while made.step():
        pass
    assert [made.answers[sequence.id] for sequence in sequences] == asked.answers()
    ran = [len(row.tokens) for step in made.device.log for row in step.rows]
    assert sum(ran) == 18 + 4 * 5


def test_who_comes_behind_leaves_places_for_other_answers_to_a_prompt_under_way() -> None:
    made = world(3, 30, 8, 18, 999, pool=True)
    made.add(Asked([1, 2] * 9, 6, n=3))
    late = made.add(Asked([0, 1], 12))
    while made.step():
        pass
    prompts = [row.sequence for step in made.device.log for row in step.prompts]
    assert prompts == [0, late[0].id]
