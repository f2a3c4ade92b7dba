"""Position policies: the level of a prompt against the formula that it stands for."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlmforge.engine.positions import ABSOLUTE, PositionPolicy, level_of
from vlmforge.errors import EngineFormatError


def alpha(tokens: int, trained: int) -> int:
    """The published formula."""
    return max(2 ** math.ceil(math.log(tokens / trained, 2) + 1) - 1, 1)


@given(st.integers(1, 70_000), st.integers(2, 5000))
@example(2048, 2048)
@example(2049, 2048)
@example(4096, 2048)
@example(4097, 2048)
@example(8192, 2048)
@example(1, 2048)
@example(330, 330)
@example(331, 330)
def test_a_level_stands_for_its_alpha(tokens: int, trained: int) -> None:
    assert 2 ** (level_of(tokens, trained) + 1) - 1 == alpha(tokens, trained)


def test_levels_of_a_policy() -> None:
    policy = PositionPolicy("dynamic_ntk", 100, 3)
    assert policy.has_levels
    found = [policy.level(n) for n in (1, 99, 100, 101, 200, 201, 400, 401, 10**6)]
    assert found == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert not ABSOLUTE.has_levels
    assert {ABSOLUTE.level(n) for n in (1, 10**6)} == {0}


def test_an_unknown_policy() -> None:
    with pytest.raises(EngineFormatError) as caught:
        PositionPolicy("spiral", 0, 1).level(3)
    assert caught.value.found == "'spiral'"
    assert "absolute, dynamic_ntk" in caught.value.expected
