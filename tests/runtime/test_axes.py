"""Places on several axes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmforge.engine.positions.absolute import Absolute
from vlmforge.engine.positions.axes import Axes
from vlmforge.engine.positions.in_graph import PlacedGrid
from vlmforge.engine.schema import from_json, to_data
from vlmforge.errors import EngineFormatError
from vlmforge.runner.stages import DecoderInput
from vlmforge_recipes.patch_vlm import in_sections, interleaved

POLICY = Axes(64, (1.0, 0.5, 0.25), (0, 1, 2))


def test_a_text_goes_on_along_all_axes_and_an_image_has_rows_and_columns() -> None:
    places = POLICY.places(12, [PlacedGrid(2, 2, 3)])
    assert places is not None
    assert places[:2].tolist() == [[0] * 3, [1] * 3]
    grid = [[2, 2 + row, 2 + column] for row in range(2) for column in range(3)]
    assert places[2:8].tolist() == grid
    assert places[8:].tolist() == [[place] * 3 for place in (5, 6, 7, 8)]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 4)), max_size=4))
def test_what_comes_before_decides(parts: list[tuple[int, int, int]]) -> None:
    """The places of a beginning are those of the whole: keys in the cache stay right."""
    images, tokens = [], 0
    for text, down, across in parts:
        images.append(PlacedGrid(tokens + text, down, across))
        tokens += text + down * across
    whole = POLICY.places(tokens + 3, images)
    assert whole is not None
    for count in range(len(images) + 1):
        end = images[count].start if count < len(images) else tokens
        first = POLICY.places(end, images[:count])
        assert first is not None
        np.testing.assert_array_equal(first, whole[:end])
    held = DecoderInput(
        np.zeros(len(whole), np.int64), None, 0, whole, len(whole) - 1 - int(whole.max())
    )
    behind = held.places_from(len(whole) - 1, 3)
    assert behind is not None
    np.testing.assert_array_equal(behind, whole.max() + np.arange(3)[:, None].repeat(3, 1))


def test_turns_are_cosines_and_sines_of_the_chosen_axis() -> None:
    places = np.array([[1, 20, 300], [2, 2, 2]])
    found = POLICY.turns(places)
    angles = places * np.array([1.0, 0.5, 0.25])
    np.testing.assert_allclose(found, np.hstack((np.cos(angles), np.sin(angles))), atol=1e-5)
    assert POLICY.turn_width == found.shape[1]
    assert Absolute().turn_width == 0
    assert Absolute().places(3, []) is None


@pytest.mark.parametrize("sections", [(4, 6, 6), (6, 5, 5), (16, 24, 24), (24, 20, 20)])
def test_axes_of_frequencies(sections: tuple[int, int, int]) -> None:
    """As the two ways of `recomposition_frequencies` choose among values that tell their axis."""
    half = sum(sections)
    freq = torch.arange(3)[:, None].expand(3, half)
    cut = [part[i % 3] for i, part in enumerate(freq.split(list(sections), dim=-1))]
    assert list(in_sections(sections)) == torch.cat(cut).tolist()
    mixed = freq[0].clone()
    for axis in (1, 2):
        mixed[axis : sections[axis] * 3 : 3] = axis
    assert list(interleaved(sections)) == mixed.tolist()


def test_axes_and_frequencies_go_together() -> None:
    data = to_data(POLICY)
    assert isinstance(data, dict)
    with pytest.raises(EngineFormatError, match="one for each"):
        from_json(Axes, {**data, "axes": [0, 1]}, "engine.json")
