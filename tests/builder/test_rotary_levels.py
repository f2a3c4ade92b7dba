"""Rotary positions at several levels, and scaled queries, against complex numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmforge_builder.blocks.long_context import (
    LevelPositions,
    LongContext,
    level_tables,
    log_scales,
    rotate,
)

DIM, ROWS, TRAINED, THETA = 16, 70, 10, 100.0


@pytest.mark.parametrize(
    ("positions", "ntk", "levels"),
    [(10, True, 1), (11, True, 2), (20, True, 2), (21, True, 3), (80, True, 4), (80, False, 1)],
)
def test_number_of_levels(positions: int, ntk: bool, levels: int) -> None:
    assert LongContext(TRAINED, ntk, log_scaled=True).levels(positions) == levels


def filled(*, log_scaled: bool) -> LevelPositions:
    context = LongContext(TRAINED, dynamic_ntk=True, log_scaled=log_scaled)
    positions = LevelPositions(context, ROWS, DIM)
    cos, sin = level_tables(THETA, DIM, ROWS, context.levels(ROWS))
    with torch.no_grad():
        assert positions.cos.shape == cos.shape == sin.shape
        positions.cos.copy_(cos)
        positions.sin.copy_(sin)
        if positions.scale is not None:
            positions.scale.copy_(log_scales(TRAINED, ROWS))
    return positions


def turned(x: torch.Tensor, place: int, level: int) -> np.ndarray:
    """One head `[DIM]` at a place, by the definition."""
    base = THETA * (2 ** (level + 1) - 1) ** (DIM / (DIM - 2))
    angles = place / base ** (np.arange(0, DIM, 2) / DIM)
    pairs = x.numpy().astype(np.float64)
    made = (pairs[: DIM // 2] + 1j * pairs[DIM // 2 :]) * np.exp(1j * angles)
    return np.concatenate((made.real, made.imag))


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), min_size=1, max_size=4),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=50)
def test_rows_of_a_step(
    sequences: list[tuple[int, int]], tokens: int, log_scaled: bool, seed: int
) -> None:
    """Sequences of different levels and lengths in one step."""
    past, levels = (torch.tensor(column) for column in zip(*sequences, strict=True))
    ids = torch.zeros(len(sequences), tokens, dtype=torch.int64)
    x = torch.randn((*ids.shape, 2 * DIM), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        rotation = filled(log_scaled=log_scaled)(past, levels, ids)
        query = rotate(x, rotation.query_cos, rotation.query_sin)
        key = rotate(x, rotation.key_cos, rotation.key_sin)
    assert query.shape == key.shape == x.shape
    for row, (start, level) in enumerate(sequences):
        for token in range(tokens):
            place = start + token
            scale = math.log(place + 1, TRAINED) if log_scaled and place >= TRAINED else 1.0
            for head in (slice(0, DIM), slice(DIM, 2 * DIM)):
                expected = turned(x[row, token, head], place, level)
                np.testing.assert_allclose(key[row, token, head], expected, atol=2e-5)
                np.testing.assert_allclose(query[row, token, head], expected * scale, atol=5e-5)


def test_scales_begin_behind_the_trained_length() -> None:
    scales = log_scales(4, 16)
    assert scales[:4].tolist() == [1.0] * 4
    assert scales[4].item() == pytest.approx(math.log(5) / math.log(4))
    assert scales[15].item() == pytest.approx(2.0)
