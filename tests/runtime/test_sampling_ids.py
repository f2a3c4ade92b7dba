"""Sampling where the id of the largest logit is all that is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
