"""Whatever runs beside a request, its greedy answer is the one that it gives alone, in each family.

The cache is too small on purpose. `scripts/interleavings.py` runs more histories, by a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import golden_engine
from golden_models import FOLDERS, TWINS
from histories import SLOTS, Family, drawn
from live_parity import engine as drawn_engine
from vlmforge import EngineConfig, pipeline

# Whose places are not those of their tokens, or whose features are for several layers.
DRAWN = {"qwen2_vl": "windowed", "qwen3_vl": "first"}


EACH = [
    pytest.param(name, marks=[pytest.mark.nightly] * (name in TWINS)) for name in (*FOLDERS, *DRAWN)
]


@pytest.fixture(scope="module", params=EACH)
def family(shared: Path, request: pytest.FixtureRequest) -> Iterator[Family]:
    name = request.param
    shape = DRAWN.get(name)
    engine = drawn_engine(shared, name, shape) if shape else golden_engine(shared, name)
    with pipeline(engine, EngineConfig(max_batch_size=SLOTS)) as pipe:
        yield Family(pipe)


# What these histories have among them is asserted, so that none of it goes missing unnoticed.
SEEDS = (2, 3, 5)


@pytest.mark.parametrize(
    "seeds", [SEEDS, pytest.param(range(100, 200), marks=pytest.mark.nightly)], ids=len
)
def test_each_answer_is_that_of_its_request_alone(family: Family, seeds: range) -> None:
    ran = [family.check(drawn(seed)) for seed in seeds]
    asking = [asking for one in ran for asking in one.asking]
    assert sum(one.preempted for one in ran) >= len(seeds)
    assert sum(one.reused for one in ran) > 0
    assert any(one.answer.finish_reason == "abort" for one in asking)
    assert any(one.conversation != one.asked.conversation for one in asking)  # forked
    assert {bool(one.conversation.images) for one in asking} == {True, False}
    assert len({one.asked.priority for one in asking}) > 1
