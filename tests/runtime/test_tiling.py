"""Views and tokens of images of any size, against the formulas of the originals.

The originals work on tensors: they reshape the views to a canvas, cut it and append a column. Here
the same is done to arrays of row numbers, which must give the rows that the runtime takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

import anyres_original
from conftest import examples
from vlmforge.engine.images.pixels import Rows, Size
from vlmforge.engine.images.tiling import (
    Lines,
    Tiling,
    UnpaddedLines,
    Views,
    best_canvas,
    fitted_size,
    most_tokens,
    tile_boxes,
    token_rows,
    view_count,
)

Unpad = Callable[[torch.Tensor, Size], torch.Tensor]

PUBLISHED = Tiling(
    tile=336,
    canvases=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    fill=(0, 0, 0),
    side=24,
    view_rows=577,
    merge=UnpaddedLines(),
)
TINY = structs.replace(
    PUBLISHED,
    tile=28,
    canvases=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84), (112, 112)),
    side=2,
    view_rows=5,
)
HF = structs.replace(PUBLISHED, merge=UnpaddedLines(digits=7))
PRIMES = (2, 3, 5, 7, 23, 97, 331, 337, 499, 673, 1009, 1999, 3989)


def awkward_sizes() -> Iterator[Size]:
    """One pixel, needles, primes, and each canvas's sides give or take one pixel."""
    lengths = {1, 4000, *PRIMES}
    yield from ((a, b) for a in lengths for b in lengths)
    near = {side + d for canvas in PUBLISHED.canvases for side in canvas for d in (-1, 0, 1)}
    yield from ((a, b) for a in near for b in near)


def many_sizes() -> list[Size]:
    rng = np.random.default_rng(5)
    drawn = np.exp(rng.uniform(0, math.log(4000), (3000, 2))).astype(int)
    return [*awkward_sizes(), *((int(w), int(h)) for w, h in drawn)]


SIZES = many_sizes()


def original_rows(size: Size, tiling: Tiling, *, unpad: Unpad = anyres_original.unpad) -> Rows:
    """The original merge of row numbers instead of features; the newline is view 0's extra row."""
    count = 1 + math.prod(side // tiling.tile for side in best_canvas(size, tiling.canvases))
    rows = torch.arange(count)[:, None] * tiling.view_rows + torch.arange(tiling.side**2)
    newline = torch.tensor([tiling.side**2])
    canvas = anyres_original.best_resolution(size, tiling.canvases)
    with mock.patch.object(anyres_original, "unpad", unpad):
        made = anyres_original.merge(rows[..., None], size, canvas, tiling.tile, newline)
    numbers: Rows = made.flatten().numpy()
    return numbers


def hf_unpad(canvas: torch.Tensor, size: Size) -> torch.Tensor:
    made = unpad_image(canvas, (size[1], size[0]))
    assert isinstance(made, torch.Tensor)
    return made


def test_canvases_are_the_originals() -> None:
    for size in SIZES:
        for tiling in (PUBLISHED, TINY):
            found = best_canvas(size, tiling.canvases)
            assert found == anyres_original.best_resolution(size, tiling.canvases), size
            flipped = [(height, width) for width, height in tiling.canvases]
            assert found[::-1] == select_best_resolution((size[1], size[0]), flipped), size


def test_resized_images_fit_and_touch_their_canvas() -> None:
    for size in SIZES:
        canvas = best_canvas(size, PUBLISHED.canvases)
        width, height = fitted_size(size, canvas)
        assert (width, height) == anyres_original.fitted_size(size, canvas), size
        assert 1 <= width <= canvas[0]
        assert 1 <= height <= canvas[1]
        assert width == canvas[0] or height == canvas[1]


@pytest.mark.parametrize("tiling", [PUBLISHED, TINY], ids=["published", "tiny"])
def test_rows_are_the_originals(tiling: Tiling) -> None:
    sizes = SIZES if tiling is TINY else SIZES[::7]
    for size in sizes:
        found = token_rows(size, tiling)
        np.testing.assert_array_equal(found, original_rows(size, tiling), str(size))
        assert found.dtype == np.int64
        assert found.max() < view_count(size, tiling) * tiling.view_rows


def test_rows_are_those_of_transformers() -> None:
    tiling = structs.replace(TINY, merge=UnpaddedLines(digits=7))
    for size in SIZES:
        expected = original_rows(size, tiling, unpad=hf_unpad)
        np.testing.assert_array_equal(token_rows(size, tiling), expected, str(size))


def test_counts_are_those_of_the_processor_of_transformers() -> None:
    class Bare(LlavaNextProcessor):
        def __init__(self) -> None:
            self.patch_size, self.num_additional_image_tokens = 14, 0
            flipped = [list(canvas[::-1]) for canvas in HF.canvases]
            self.image_processor = type("P", (), {"image_grid_pinpoints": flipped})()

    processor = Bare()
    flipped = [list(canvas[::-1]) for canvas in HF.canvases]
    for size in SIZES:
        width, height = size
        count = processor._get_number_of_features(height, width, 336, 336)
        assert len(token_rows(size, HF)) == count, size
        assert view_count(size, HF) == image_size_to_num_patches((height, width), flipped, 336)
        grid = get_anyres_image_grid_shape((height, width), flipped, 336)
        canvas = best_canvas(size, HF.canvases)
        assert tuple(grid) == (canvas[1] // 336, canvas[0] // 336)


@pytest.mark.parametrize(("size", "exact"), [((88, 55), 15), ((55, 176), 15), ((47, 1128), 3)])
def test_the_two_roundings_differ(size: Size, exact: int) -> None:
    """At these sizes a float error costs the original a line, and transformers none."""
    counts = [len(token_rows(size, tiling)) for tiling in (PUBLISHED, HF)]
    assert counts[0] != counts[1]
    width, height = best_canvas(size, HF.canvases)
    across, down = width // 14, height // 14
    scaled = (
        size[1] * (across / size[0])
        if across / size[0] < down / size[1]
        else (size[0] * (down / size[1]))
    )
    assert int(scaled) == exact - 1
    assert round(scaled, 7) == exact


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((640, 480), 2340), ((300, 900), 2376), ((1000, 333), 2328), ((672, 672), 2928)],
)
def test_published_counts(size: Size, tokens: int) -> None:
    assert len(token_rows(size, PUBLISHED)) == tokens


def test_no_image_takes_more_than_most_tokens() -> None:
    for tiling in (PUBLISHED, TINY):
        for merge in (Views(), Lines(), UnpaddedLines(), UnpaddedLines(digits=7)):
            merged = structs.replace(tiling, merge=merge)
            most = most_tokens(merged)
            assert all(len(token_rows(size, merged)) <= most for size in SIZES[::11])
    assert most_tokens(PUBLISHED) == 2928


@given(st.sampled_from(TINY.canvases))
def test_boxes_cover_the_canvas_once(canvas: Size) -> None:
    seen = np.zeros(canvas[::-1], int)
    boxes = tile_boxes(canvas, TINY.tile)
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == (TINY.tile, TINY.tile)
        seen[top:bottom, left:right] += 1
    assert (seen == 1).all()
    assert list(boxes) == sorted(boxes, key=lambda box: (box[1], box[0]))


@given(st.integers(1, 5000), st.integers(1, 5000))
@settings(max_examples=examples(300))
def test_padded_lines_hold_every_row_once(width: int, height: int) -> None:
    lines = structs.replace(TINY, merge=Lines(), view_rows=4)
    rows = token_rows((width, height), lines)
    assert sorted(rows) == list(range(view_count((width, height), lines) * 4))
    views = structs.replace(lines, merge=Views())
    assert token_rows((width, height), views).tolist() == sorted(rows)
