"""The resampler against torch's own attention, and weights stored in other arrangements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from vlmforge.errors import TensorError
from vlmforge_builder.blocks.resampler import (
    PatchTower,
    ResampledEncoder,
    Resampler,
    ResamplerConfig,
)
from vlmforge_builder.blocks.vision import VisionConfig
from vlmforge_builder.checkpoint.mapped import TensorInfo
from vlmforge_builder.rearranged_weights import PerHead, ResizedGrid, Rows


class Held:
    """A store of one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def names(self) -> tuple[str, ...]:
        return ("x",)

    def info(self, name: str) -> TensorInfo:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return TensorInfo(name, dtype, tuple(self.tensor.shape), Path("weights.bin"))

    def read(self, name: str) -> Tensor:
        return self.tensor

    def __contains__(self, name: object) -> bool:
        return name == "x"


def randomised(module: nn.Module, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return module.eval()


@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8]),
    queries=st.integers(1, 6),
    patches=st.integers(1, 9),
    images=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_it_is_torchs_attention(
    heads: int, head_dim: int, queries: int, patches: int, images: int, seed: int
) -> None:
    width, inputs = heads * head_dim, 5
    ours = randomised(
        Resampler(ResamplerConfig(queries, width, heads, 1e-6), inputs=inputs, patches=patches),
        seed,
    )
    theirs = nn.MultiheadAttention(width, heads)
    parts = (ours.q_proj, ours.k_proj, ours.v_proj)
    theirs.in_proj_weight.data = torch.cat([part.weight.T for part in parts])
    theirs.in_proj_bias.data = torch.cat([part.bias for part in parts])
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.out.weight.T, ours.out.bias
    x = torch.randn((images, patches, inputs), generator=torch.Generator().manual_seed(seed + 1))

    def norm(value: Tensor, layer: Any) -> Tensor:
        return F.layer_norm(value, (width,), layer.weight, layer.bias, 1e-6)

    kv = norm(x @ ours.kv.weight, ours.kv_norm).transpose(0, 1)
    query = (norm(ours.queries, ours.query_norm) + ours.query_positions)[:, None]
    with torch.no_grad():
        expected = theirs(query.expand(-1, images, -1), kv + ours.key_positions[:, None], kv)[0]
        np.testing.assert_allclose(ours(x), expected.transpose(0, 1), atol=2e-5, rtol=1e-4)


def test_an_encoder_treats_each_image_alone() -> None:
    tower = VisionConfig(12, 4, 8, 16, 2, 2, 1e-6, "gelu", keep_class_token=False)
    encoder = randomised(ResampledEncoder(tower, ResamplerConfig(4, 6, 2, 1e-6)), 3)
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = encoder(images)
        assert together.shape == (3, 4, 6)
        for image, rows in zip(images, together, strict=True):
            np.testing.assert_allclose(encoder(image[None])[0], rows, atol=1e-5)
        assert together.std() > 0.01


def test_patches_are_read_row_by_row() -> None:
    config = VisionConfig(8, 4, 5, 16, 0, 1, 1e-6, "gelu", keep_class_token=False)
    tower = randomised(PatchTower(config), 4)
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = torch.stack(
        [
            (tower.patch * image[0, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]).sum((1, 2, 3))
            for y in range(2)
            for x in range(2)
        ]
    )
    norm = tower.pre_norm
    expected = F.layer_norm(expected + tower.positions, (5,), norm.weight, norm.bias, 1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(tower(image)[0], expected, atol=1e-5)


# --- weights in other arrangements ---------------------------------------------------------------


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rows", "target"), [(4, 4), (4, 8), (4, 3), (16, 32), (1, 2)])
def test_a_grid_is_resized(rows: int, target: int) -> None:
    table = drawn(rows * rows, 5)
    found = ResizedGrid("x", rows).read(Held(table), (target * target, 5))
    grid = table.reshape(rows, rows, 5).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, (target, target), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(
        found.reshape(target, target, 5), expected[0].permute(1, 2, 0), atol=1e-6
    )
    if rows == target:
        assert found is table


def test_a_grid_in_16_bits_is_resized_in_32() -> None:
    table = drawn(16, 3).bfloat16()
    found = ResizedGrid("x", 4).read(Held(table), (64, 3))
    expected = ResizedGrid("x", 4).read(Held(table.float()), (64, 3))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_grid_that_is_none() -> None:
    with pytest.raises(TensorError) as caught:
        ResizedGrid("x", 4).read(Held(drawn(16, 3)), (7, 3))
    assert caught.value.found == "7 places"
    with pytest.raises(TensorError):
        ResizedGrid("x", 4).read(Held(drawn(9, 3)), (64, 3))


@pytest.mark.parametrize(("heads", "parts", "dim"), [(2, 3, 4), (1, 3, 5), (3, 2, 2)])
def test_projections_head_by_head(heads: int, parts: int, dim: int) -> None:
    size, inner = heads * parts * dim, 7
    matrix, bias = drawn(size, inner), drawn(size)
    weight = PerHead("x", heads, parts).read(Held(matrix), (inner, size))
    vector = PerHead("x", heads, parts).read(Held(bias), (size,))
    x = drawn(2, inner)
    made = x @ weight + vector
    theirs = F.linear(x, matrix, bias).reshape(2, heads, parts, dim)
    for part, ours in enumerate(made.chunk(parts, dim=-1)):
        expected = theirs[:, :, part].flatten(1)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_some_rows() -> None:
    matrix, bias = drawn(12, 5), drawn(12)
    weight = Rows("x", 4, 12).read(Held(matrix), (5, 4))
    assert torch.equal(weight, matrix[4:8].T)
    assert torch.equal(Rows("x", 8, 12).read(Held(bias), (4,)), bias[8:])
    with pytest.raises(TensorError):
        Rows("x", 4, 13).read(Held(matrix), (5, 4))
