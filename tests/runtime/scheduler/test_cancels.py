"""A thousand cancels at any moment: each stops within a step, and no block is lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from stand_in import Parts, answered, plain, png, settle, stand_in
from token_store import BlockStore, next_token
from vlmforge import Response
from vlmforge.kv.blocks import BlockPool
from vlmforge.kv.slots import SlotCache
from vlmforge.runner.step import Step, StepResult
from vlmforge.scheduler.jobs import Jobs
from vlmforge.scheduler.scheduler import Scheduler
from vlmforge.scheduler.sequence import State, TokenSequence
from vlmforge.vl.prepared import PreparedImage

BLOCK, BUDGET, CANCELS = 8, 30, 1000


class Canceller:
    """Cancels running and waiting jobs in the middle of steps, and counts their steps after."""

    def __init__(self, jobs: Jobs, seed: int) -> None:
        self._jobs, self._draw, self._run = jobs, random.Random(seed), jobs._runner.run
        self.steps, self.at = 0, dict[int, int]()
        self.delays: Counter[int] = Counter()  # of cancels, by steps that their rows were in after

    def run(self, step: Step, ahead: Iterable[PreparedImage] = ()) -> StepResult:
        self.steps += 1
        self._account(step)
        for row in step.rows:
            if row.sequence in self.at:
                self.delays[self.steps - self.at[row.sequence]] += 1
        there = [name for name in self._jobs._jobs if name not in self.at]
        if there and self._draw.random() < 0.9:
            name = self._draw.choice(there)
            self._jobs._jobs[name][1].cancelled.set()
            self.at[name] = self.steps
        return self._run(step, ahead)

    def _account(self, step: Step) -> None:
        """Who has a place runs, and has the blocks of its tokens; nobody else has any."""
        cache, running = self._jobs._cache, self._jobs._scheduler.running
        assert isinstance(cache, SlotCache)
        assert set(cache._place) == {sequence.id for sequence in running}
        stops = {row.sequence: row.stop for row in step.rows}
        tokens = [max(s.computed, stops.get(s.id, 0)) for s in running]
        assert cache.held_blocks == sum(-(-count // BLOCK) for count in tokens)
        assert cache.held_blocks <= cache.used_blocks <= BUDGET


def test_a_thousand_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[object] = ["a", "a b", ("look", png(1)), ("look", [png(1), png(2)]), "c d e"]
    count = 3 * CANCELS // 2
    with stand_in(Parts(4), slots=4, blocks=(BLOCK, BUDGET), max_prefill_token_num=9) as pipe:
        jobs = pipe._scheduler._jobs
        canceller = Canceller(jobs, seed=1)
        monkeypatch.setattr(jobs._runner, "run", canceller.run)
        configs = [plain(3 + i % 25) for i in range(count)]
        answers = answered(lambda: pipe([prompts[i % 5] for i in range(count)], configs))
        assert isinstance(answers, list)
        settle(pipe)  # the last answer is told of before its blocks are free
        assert jobs._cache.held_blocks == 0
        ends = Counter(answer.finish_reason for answer in answers)
    assert len(canceller.at) >= CANCELS
    assert not canceller.delays  # the step that it came in was the last
    # One that came in the last step of an answer, or while it waited, may leave it whole.
    assert ends["abort"] + ends["length"] == count
    assert 0.9 * len(canceller.at) <= ends["abort"] <= len(canceller.at)
    aborted = [answer for answer in answers if answer.finish_reason == "abort"]
    assert {bool(answer.token_ids) for answer in aborted} == {True, False}
    assert all(isinstance(answer, Response) for answer in answers)


def test_blocks_of_a_pool_are_accounted_for() -> None:
    """Shared ones too: each is used as often as sequences have it."""
    draw, pool = random.Random(2), BlockPool(BUDGET, BLOCK)
    store, scheduler = BlockStore(pool), Scheduler(pool, rows=4, chunk=9)
    sequences: list[TokenSequence] = []
    cancelled = 0
    while cancelled < CANCELS:
        if len(scheduler.waiting) < 3:
            tokens = [draw.randrange(3) for _ in range(draw.randint(1, 40))]
            sequences.append(TokenSequence(len(sequences), tokens, np.array(tokens)))
            scheduler.add(sequences[-1])
        step = scheduler.schedule()
        assert step is not None
        store.move(step.moves)
        results: dict[int, int | None] = {}
        for row in step.rows:
            store.write(row.place, row.start, row.tokens)
            if row.logits != "none":
                ends = row.stop > 60
                results[row.sequence] = None if ends else next_token(store.read(row.place, 1))
        scheduler.update(step, StepResult(results))
        if draw.random() < 0.6:
            there = [s for s in sequences[-12:] if s.state is not State.ENDED]
            for sequence in draw.sample(there, min(1, len(there))):
                scheduler.remove(sequence)
                cancelled += 1
        had = Counter(block for s in scheduler.running for block in pool.place(s.id))
        assert [pool.uses(block) for block in range(BUDGET)] == [had[b] for b in range(BUDGET)]
        assert pool.free_blocks == BUDGET - len(had)
