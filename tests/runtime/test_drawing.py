"""A random number falls where adding up all weights one by one says, in large vocabularies too."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlmforge.outputs import drawing
from vlmforge.outputs.drawing import draw, nucleus


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


@given(
    size=st.sampled_from((1, 2, 100, 5000, 32_000)),
    spread=st.sampled_from((0.0, 0.3, 3.0, 30.0)),
    levels=st.sampled_from((0, 3, 50)),  # so many different ones; 0: as many as there are
    temperature=st.sampled_from((1e-44, 1e-50, 0.01, 0.7, 1.0, 3.0, 1e30)),
    top_p=st.sampled_from((1e-9, 0.00101, 0.3003, 0.5, 0.9001, 0.99991, math.nextafter(1, 0))),
    banned=st.sampled_from((0.0, 0.5)),
    seed=st.integers(0, 9),
)
def test_a_nucleus_is_what_sorting_all_gives(
    size: int,
    spread: float,
    levels: int,
    temperature: float,
    top_p: float,
    banned: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal(size)).astype(np.float32)
    if levels:
        logits = np.round(logits * levels) / np.float32(levels)
    logits[1:][rng.random(size - 1) < banned] = -np.inf
    with np.errstate(over="ignore"):
        whole = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-whole, kind="stable")
    places, weights = nucleus(logits, temperature, top_p)
    assert places.tolist() == order[: len(places)].tolist()
    np.testing.assert_array_equal(weights, whole[places])
    wanted, slack = top_p * math.fsum(whole), 1e-12 * math.fsum(whole)
    assert math.fsum(weights) >= wanted - slack
    assert math.fsum(weights[:-1]) <= wanted + slack


def test_an_end_that_float32_cannot_tell_is_looked_for_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first 100 have just under, or just over, what is wanted: by a part in a million."""
    logits = np.linspace(0, -5, 3000, dtype=np.float32)
    weights = np.exp(logits.astype(np.float64))
    reached = float(np.cumsum(weights)[99] / weights.sum())
    lengths = []
    real = drawing.weights_of

    def noted(logits: NDArray[np.float32], *given: Any) -> NDArray[np.float64]:
        lengths.append(len(logits))
        return real(logits, *given)

    monkeypatch.setattr(drawing, "weights_of", noted)
    assert len(nucleus(logits, 1.0, reached * (1 - 1e-6))[0]) == 100
    assert len(nucleus(logits, 1.0, reached * (1 + 1e-6))[0]) == 101
    assert lengths.count(3000) == 2
    assert len(nucleus(logits, 1.0, reached * (1 + 1e-4))[0]) == 101
    assert lengths.count(3000) == 2
    assert max(lengths[4:]) < 3000
