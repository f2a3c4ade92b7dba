"""Presence and frequency penalties, as OpenAI's API has them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlmforge.outputs.sampling import Sampler, SamplingParams


@given(
    presence=st.floats(-2, 2, width=32),
    frequency=st.floats(-2, 2, width=32),
    seed=st.integers(0, 1000),
)
def test_presence_and_frequency_penalties(presence: float, frequency: float, seed: int) -> None:
    """OpenAI's formula: logits[t] - count[t] * frequency - (count[t] > 0) * presence."""
    rng, done = np.random.default_rng(seed), list[int]()
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    sampler = Sampler(params, 5, [4, 4])  # the prompt's tokens are not counted
    for _ in range(12):
        logits = rng.normal(size=5).astype(np.float32)
        counts = np.array([done.count(token) for token in range(5)])
        wanted = logits - counts * frequency - (counts > 0) * presence
        token = sampler.step(logits).id
        assert wanted[token] >= wanted.max() - 1e-5
        done.append(token)
