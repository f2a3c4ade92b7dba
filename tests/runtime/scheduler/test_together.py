"""How much of which prompts runs in one step: little is wasted, and nobody is passed by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmforge.backends.cuda.frames import Size, bucket, packed_tokens
from vlmforge.kv.blocks import BlockPool
from vlmforge.runner.step import Step, StepResult
from vlmforge.scheduler.scheduler import Scheduler
from vlmforge.scheduler.sequence import TokenSequence
from vlmforge.scheduler.together import Together

CHUNK, WINDOW = 2048, 4096
LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=24)


def steps_of(lengths: list[int], *, packs: bool, rows: int) -> list[Step]:
    """Prompts that are there at once, each for one token."""
    cache = BlockPool(10_000, 64, reuse=False)
    together = Together(CHUNK, rows, packs, WINDOW)
    scheduler = Scheduler(cache, rows=rows, chunk=CHUNK, together=together)
    for name, length in enumerate(lengths):
        tokens = [name] * length
        scheduler.add(TokenSequence(name, tokens, np.array(tokens)))
    steps = list[Step]()
    while (step := scheduler.schedule()) is not None:
        steps.append(step)
        ended = {row.sequence: None for row in step.prompts if row.logits == "last"}
        scheduler.update(step, StepResult(ended))
    return steps


@given(LENGTHS, st.booleans(), st.integers(1, 16))
def test_little_is_run_that_nobody_asked_for(lengths: list[int], packs: bool, rows: int) -> None:
    steps = steps_of(lengths, packs=packs, rows=rows)
    for step in steps:
        widths = [len(row.tokens) for row in step.prompts]
        asked = sum(widths)
        run = packed_tokens(asked) if packs else len(widths) * max(widths)
        assert run <= CHUNK
        assert run - asked <= (asked / 32 if packs else max(0.15 * run, 256))
    assert sum(len(row.tokens) for step in steps for row in step.prompts) == sum(lengths)


@given(LENGTHS, st.booleans(), st.integers(1, 16))
def test_prompts_begin_and_end_in_the_order_in_which_they_came(
    lengths: list[int], packs: bool, rows: int
) -> None:
    steps = steps_of(lengths, packs=packs, rows=rows)
    every = [row for step in steps for row in step.prompts]
    assert [row.sequence for row in every] == sorted(row.sequence for row in every)
    # And the first of all never waits for another: each step goes on with it.
    left = dict(enumerate(lengths))
    for step in steps:
        assert step.prefill is not None and step.prefill.sequence == min(left)
        for row in step.prompts:
            left[row.sequence] -= len(row.tokens)
        left = {name: tokens for name, tokens in left.items() if tokens}


@given(st.lists(st.integers(1, 3000), min_size=16, max_size=24))
def test_steps_of_packed_prompts_are_full(lengths: list[int]) -> None:
    """But where what is left of a step is not worth a beginning, or there are no more prompts."""
    for step in steps_of(lengths, packs=True, rows=64)[:-1]:
        assert sum(len(row.tokens) for row in step.prompts) > CHUNK - 256


@pytest.mark.parametrize("packs", [True, False])
def test_a_short_prompt_is_not_run_as_long_as_a_long_one(packs: bool) -> None:
    steps = steps_of([100, 1500, 90], packs=packs, rows=4)
    widths = [[len(row.tokens) for row in step.prompts] for step in steps]
    assert widths == ([[100, 1500, 90]] if packs else [[100], [1500], [90]])


@given(st.integers(1, 9000), st.integers(1, 64), st.integers(0, 1))
def test_sizes_of_packed_prompts_are_few(tokens: int, packed: int, each: int) -> None:
    size = Size(1, tokens, packed * each, 1, 4096, packed)
    found = bucket(size, 64, 4096, 8192)
    assert found.tokens >= tokens and found.packed >= packed
    assert found.tokens == tokens or found.tokens <= min(8192, tokens * 33 / 32)
    assert found.packed < 2 * packed and found.outputs == found.packed * each
    assert bucket(found, 64, 4096, 8192) == found
    assert not found.replayed


def test_there_are_few_sizes_of_packed_prompts() -> None:
    assert len({packed_tokens(tokens) for tokens in range(1024, 2048)}) == 33
