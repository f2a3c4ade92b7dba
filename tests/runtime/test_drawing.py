"""A random number falls where adding up all weights one by one says, in large vocabularies too."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmforge.outputs.drawing import draw


@given(
    size=st.sampled_from((1, 7, 1024, 1025, 5000)),
    kept=st.floats(0, 1),
    seed=st.integers(0, 1000),
    number=st.floats(0, math.nextafter(1, 0)),
)
def test_it_falls_where_exact_sums_say(size: int, kept: float, seed: int, number: float) -> None:
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random(size) <= kept, rng.random(size), 0.0)
    weights[int(rng.integers(size))] = 1.0
    place = draw(None, weights, number)
    assert weights[place] > 0
    begin = sum(map(Fraction, weights[:place].tolist()), Fraction(0))
    end, total = begin + Fraction(weights[place]), sum(map(Fraction, weights.tolist()))
    slack = Fraction(1, 10**12)
    assert begin / total - slack <= Fraction(number) <= end / total + slack


@pytest.mark.parametrize("number", [0.0, math.nextafter(1, 0)])
@pytest.mark.parametrize("places", [(0,), (1023,), (1024,), (4999,), (1023, 1024), (2000, 4999)])
def test_the_ends_of_the_interval_hit_what_has_weight(number: float, places: list[int]) -> None:
    weights = np.zeros(5000)
    weights[list(places)] = 1e-300
    assert draw(None, weights, number) == (places[-1] if number else places[0])
    ids = np.arange(5000) + 7
    assert draw(ids, weights, number) == (places[-1] if number else places[0]) + 7
