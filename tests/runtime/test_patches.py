"""Images in patches against the published processor and the functions of transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from msgspec import structs
from transformers import vision_utils
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from live_parity import picture
from vlmforge.engine.images.center_crop import CenterCrop
from vlmforge.engine.images.patch_inputs import interpolation, turns, windows
from vlmforge.engine.images.patches import Patches
from vlmforge.engine.images.pixels import PixelFormat, PixelRange
from vlmforge.errors import ConfigError, ImageError

FORMAT = PixelFormat(
    "bicubic", 1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
FREQUENCIES = tuple((1.0 / (10000.0 ** (torch.arange(0, 16, 2).float() / 16))).tolist())
# As published: Qwen2-VL, Qwen2.5-VL, Qwen3-VL; and one with narrow limits.
POLICIES = {
    "qwen2_vl": Patches(FORMAT, 14, 2, 2, 56 * 56, 28 * 28 * 1280, FREQUENCIES),
    "qwen2_5_vl": Patches(FORMAT, 14, 2, 2, 56 * 56, 12845056, FREQUENCIES, window=4),
    "qwen3_vl": Patches(FORMAT, 16, 2, 2, 65536, 16777216, FREQUENCIES, table=48),
    "narrow": Patches(FORMAT, 14, 2, 2, 28 * 28 * 7, 28 * 28 * 9, FREQUENCIES),
}
PRIMES = (2, 3, 5, 7, 13, 29, 31, 53, 97, 211, 499, 997, 1999, 3989)


def sizes(policy: Patches) -> list[tuple[int, int]]:
    """More than a thousand: drawn, primes, lines, and around what changes the outcome."""
    drawn = np.random.default_rng(7)
    found = [(int(a), int(b)) for a, b in np.exp(drawn.uniform(0, 8.4, (700, 2))).astype(int)]
    found += [(a, b) for a in PRIMES for b in PRIMES]
    found += [(1, 1), (1, 200), (1, 201), (4000, 1), (20, 4000), (19, 4000)]
    unit = policy.patch * policy.merge
    for pixels in (policy.min_pixels, policy.max_pixels):
        edge = math.isqrt(pixels)
        around = [edge // unit * unit + step for step in (-unit // 2, -1, 0, 1, unit // 2)]
        found += [(max(1, a), max(1, b)) for a in around for b in around]
    halves = [unit * n // 2 + step for n in range(1, 10) for step in (-1, 0, 1)]
    found += [(a, 3 * unit) for a in halves] + [(3 * unit, a) for a in halves]
    return [*dict.fromkeys(found)]


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_of_a_thousand_sizes(name: str) -> None:
    policy = POLICIES[name]
    unit, seen, refused = policy.patch * policy.merge, sizes(policy), 0
    assert len(seen) > 900
    most = policy.most_tokens(0)
    for width, height in seen:
        try:
            theirs = smart_resize(height, width, unit, policy.min_pixels, policy.max_pixels)
        except ValueError:
            refused += 1
            with pytest.raises(ImageError, match="too narrow"):
                policy.grid((width, height))
            continue
        down, across = policy.grid((width, height))
        assert (down * unit, across * unit) == theirs, (width, height)
        rows = policy.rows((width, height))
        assert rows is not None
        assert rows.tolist() == list(range(down * across))
        assert len(rows) <= most
    assert refused > 5


@pytest.mark.parametrize("size", [(1, 1), (40, 8000), (640, 481), (97, 53), (300, 20)])
@pytest.mark.parametrize("name", ["qwen2_vl", "narrow"])
def test_pixels(name: str, size: tuple[int, int]) -> None:
    policy = POLICIES[name]
    limits = {"shortest_edge": policy.min_pixels, "longest_edge": policy.max_pixels}
    processor = Qwen2VLImageProcessorPil(size=limits, patch_size=policy.patch)
    image = picture(*size)
    given = processor(image, return_tensors="np")
    found = policy.pixels(image)
    down, across = policy.grid(size)
    assert given["image_grid_thw"].tolist() == [[1, 2 * down, 2 * across]]
    assert found.shape[:3] == (1, down * across, 4)
    theirs = given["pixel_values"].reshape(found.shape)
    np.testing.assert_allclose(found, theirs, atol=1e-5, rtol=0)


GRIDS = [(1, 1), (2, 7), (4, 4), (5, 9), (8, 3), (1, 20)]


def thw(grid: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])


@pytest.mark.parametrize("grid", GRIDS)
def test_places_of_patches(grid: tuple[int, int]) -> None:
    theirs = vision_utils.get_vision_position_ids(thw(grid), 2)[..., None].float()
    angles = (theirs * torch.tensor(FREQUENCIES)).flatten(1)
    found = turns(grid, 2, FREQUENCIES)
    for name, values in (("patch_cos", angles.cos()), ("patch_sin", angles.sin())):
        flat = found[name].reshape(values.shape)
        np.testing.assert_allclose(flat, values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", [1, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_windows(grid: tuple[int, int], side: int) -> None:
    index, bounds = vision_utils.get_vision_window_index(thw(grid), 2, side * 28, 14)
    lengths = (bounds[1:] - bounds[:-1]) // 4
    found = windows(grid, side)
    rows, counts = found["window_rows"], found["window_sizes"]
    assert rows.shape == (len(lengths), side * side)
    assert counts.tolist() == lengths.tolist()
    kept = [row[:count].tolist() for row, count in zip(rows, counts, strict=True)]
    assert [token for row in kept for token in row] == index.tolist()
    assert rows.reshape(-1)[found["window_places"]].tolist() == list(range(math.prod(grid)))
    # What windows take grows with the tokens of an image, not with their square.
    padded = [-(-length // side) * side for length in grid]
    assert rows.size == math.prod(padded)


@pytest.mark.parametrize("grid", GRIDS)
def test_interpolated_places(grid: tuple[int, int]) -> None:
    rows, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        thw(grid), 7, align_corners=True, spatial_merge_size=2
    )
    found = interpolation(grid, 2, 7)
    np.testing.assert_array_equal(found["place_rows"].reshape(-1, 4), rows)
    np.testing.assert_allclose(found["place_weights"].reshape(-1, 4), weights, atol=1e-6, rtol=0)


def test_what_a_part_takes_is_named_by_its_policy() -> None:
    for policy in POLICIES.values():
        inputs = policy.patch_inputs
        arrays = policy.arrays((3, 5))
        assert arrays["patch_cos"].shape == (15, inputs.group, inputs.angles)
        assert ("window_rows" in arrays) == (inputs.window > 0)
        assert ("place_rows" in arrays) == inputs.places


def test_limits_of_pixels() -> None:
    policy = POLICIES["narrow"]
    smaller = policy.within(PixelRange(None, 28 * 28 * 8))
    assert (smaller.min_pixels, smaller.max_pixels) == (policy.min_pixels, 28 * 28 * 8)
    assert structs.replace(smaller, max_pixels=policy.max_pixels) == policy
    for least, most in ((28 * 28 * 10, None), (None, 28 * 28 * 6), (1, 27 * 27)):
        with pytest.raises(ConfigError, match="leave no size"):
            policy.within(PixelRange(least, most))
    larger = policy.within(PixelRange(None, 28 * 28 * 12), tokens=12)
    assert larger.max_pixels == 28 * 28 * 12
    for most, tokens in ((28 * 28 * 9 + 1, 0), (28 * 28 * 12 + 1, 12), (1 << 45, 1 << 31)):
        with pytest.raises(ConfigError, match="larger than it may be"):
            policy.within(PixelRange(None, most), tokens)
    crop = CenterCrop(FORMAT, 8, (8, 8))
    assert crop.within(PixelRange()) is crop
    with pytest.raises(ConfigError, match="no limits of pixels"):
        crop.within(PixelRange(1))
