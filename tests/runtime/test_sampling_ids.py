"""Sampling where the id of the largest logit is all that is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmforge.backends.choice import Choice, Picked
from vlmforge.errors import EngineError
from vlmforge.outputs.sampling import Sampler, SamplingParams


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5))
def test_ids_of_the_largest_choose_as_logits_do(steps: list[list[int]]) -> None:
    by_logits, by_ids = Sampler(SamplingParams(), 6), Sampler(SamplingParams(), 6)
    for values in steps:
        logits = np.array(values, np.float32)
        assert by_ids.step(logits.argmax()) == by_logits.step(logits)


def test_an_id_of_logits_that_were_not_finite_is_an_error_of_the_engine() -> None:
    with pytest.raises(EngineError, match="not finite"):
        Sampler(SamplingParams(), 6).step(np.int64(-1))


@pytest.mark.parametrize(
    ("params", "enough"),
    [
        (SamplingParams(), True),
        (SamplingParams(temperature=0.5, top_k=3), True),  # greedy: they play no part
        (SamplingParams(held_ids=(2,)), True),
        (SamplingParams(held_ids=(2,), min_new_tokens=1), False),
        (SamplingParams(greedy=False), False),
        (SamplingParams(repetition_penalty=1.1), False),
        (SamplingParams(presence_penalty=0.5), False),
        (SamplingParams(frequency_penalty=-0.5), False),
        (SamplingParams(bad_words=((1,),)), False),
        (SamplingParams(logprobs=1), False),
        (SamplingParams(logits_processors=(lambda ids, logits: logits,)), False),
    ],
)
def test_when_the_id_of_the_largest_is_enough(params: SamplingParams, enough: bool) -> None:
    assert params.likeliest is enough


AHEAD = {
    "greedy": SamplingParams(),
    "drawn": SamplingParams(greedy=False, temperature=0.7, top_k=5, seed=3),
    "held": SamplingParams(greedy=False, seed=4, held_ids=(2,), min_new_tokens=4),
    "one banned": SamplingParams(bad_words=((1,),)),
}


def told(choice: Choice | None) -> object:
    assert choice is not None
    edits = choice.edits
    return choice.numbers, [part.tolist() for part in (edits.ids, edits.factors, edits.minus)]


@pytest.mark.parametrize("name", AHEAD)
def test_a_choice_that_is_told_ahead_is_the_one_that_is_told_then(name: str) -> None:
    """And the numbers are those that are drawn where the logits are."""
    ahead, later, here = (Sampler(AHEAD[name], 6) for _ in range(3))
    logits = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    for row in logits:
        known = ahead.choice(1)
        token = Picked(here.step(row).id)
        assert told(later.choice()) == told(ahead.choice())
        ahead.step(token)
        later.step(token)
        assert told(known) == told(ahead.choice())
    assert here.rng is None or here.rng.random() == later.rng.random()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.1),
        SamplingParams(presence_penalty=0.5),
        SamplingParams(frequency_penalty=-0.5),
        SamplingParams(bad_words=((1, 2),)),
    ],
)
def test_what_looks_back_cannot_be_told_ahead(params: SamplingParams) -> None:
    sampler = Sampler(params, 6)
    assert sampler.choice() is not None
    assert sampler.choice(1) is None
