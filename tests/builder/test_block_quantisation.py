"""Weights as whole numbers in blocks: how good they are, and the bytes that they become."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlmforge.errors import TensorError
from vlmforge_builder.block_quantisation import (
    Blocks,
    ForMatMulNBits,
    InBlocks,
    cut,
    pack_int4,
    quantise,
)
from vlmforge_builder.weights import AsDtype, Computed, plan, weight_bytes, write

Array = NDArray[np.float64]


def draw_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal weights of very different sizes, a few of them large, a block of zeroes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values *= 10 ** torch.empty(rows, 1).uniform_(-6, 2, generator=generator)
    values[torch.rand(rows, columns, generator=generator) < 0.01] *= 8
    values[:32, 0] = 0
    return values


matrices = st.builds(
    draw_matrix, st.sampled_from([32, 64, 160]), st.sampled_from([32, 96]), st.integers(0, 2**32)
)
all_blocks = st.builds(
    Blocks, st.sampled_from([4, 8]), st.integers(0, 1), st.sampled_from([16, 32])
)


def grouped(values: torch.Tensor, blocks: Blocks) -> Array:
    """`[block, other axis, within the block]`."""
    array = values.double().numpy()
    if blocks.axis == 1:
        array = array.T
    return np.moveaxis(array.reshape(-1, blocks.size, array.shape[1]), 1, 2)


def by_block(scales: torch.Tensor, blocks: Blocks) -> Array:
    array = scales.double().numpy()
    return np.asarray(array.T if blocks.axis else array)[..., None]


@settings(max_examples=60)
@given(matrices, all_blocks, st.sampled_from(["float32", "float16", "bfloat16"]))
def test_every_weight_is_near_its_number(values: torch.Tensor, blocks: Blocks, dtype: str) -> None:
    numbers, scales = quantise(values, blocks, dtype)
    most = 2 ** (blocks.bits - 1) - 1
    assert numbers.dtype == torch.int8
    assert numbers.shape == values.shape
    assert tuple(scales.shape) == blocks.scales_shape(tuple(values.shape))
    assert -most - 1 <= numbers.min() and numbers.max() <= most
    assert (scales > 0).all()
    weights, step = grouped(values, blocks), by_block(scales, blocks)
    error = np.abs(weights - grouped(numbers, blocks) * step)
    largest = np.abs(weights).max(axis=-1, keepdims=True)
    clipped = np.maximum(np.abs(weights) - (most + 0.5) * step, 0)
    assert (error <= step / 2 * 1.001 + clipped * 1.001).all()
    # No block is worse than by the plain rule: its largest weight is the largest number.
    plain = np.maximum(largest / most, 1e-30)
    worst = np.square(weights - np.clip(np.round(weights / plain), -most - 1, most) * plain)
    if dtype == "float32":  # the others round the scale as well
        assert (np.square(error).sum(-1) <= worst.sum(-1) * 1.0001).all()


def test_fewer_bits_choose_finer_steps_than_the_largest_weight_asks_for() -> None:
    values = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
    blocks = Blocks(4, 0, 128)
    numbers, scales = quantise(values, blocks, "float32")
    error = grouped(values, blocks) - grouped(numbers, blocks) * by_block(scales, blocks)
    plain = np.abs(grouped(values, blocks)).max(-1, keepdims=True) / 7
    coarse = grouped(values, blocks) - np.round(grouped(values, blocks) / plain) * plain
    assert np.square(error).sum() < 0.8 * np.square(coarse).sum()


@settings(max_examples=30)
@given(st.integers(0, 2**32), all_blocks)
def test_numbers_times_a_scale_come_back(seed: int, blocks: Blocks) -> None:
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (blocks.bits - 1) - 1
    numbers = torch.randint(-most, most + 1, (64, 64), generator=generator)
    numbers[:: blocks.size] = most  # so that each block's scale can be told
    numbers[:, :: blocks.size] = most
    found, scales = quantise(numbers * 0.5, blocks, "float16")
    assert torch.equal(found.long(), numbers)
    assert (scales == 0.5).all()


def test_a_block_does_not_know_of_the_others() -> None:
    values = draw_matrix(64, 32, 3)
    changed = values.clone()
    changed[32:] *= 100
    for bits in (4, 8):
        pair = [quantise(v, Blocks(bits, 0, 32), "float32") for v in (values, changed)]
        assert torch.equal(pair[0][0][:32], pair[1][0][:32])
        assert torch.equal(pair[0][1][0], pair[1][1][0])


def test_slabs_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    values, blocks = draw_matrix(160, 96, 5), Blocks(4, 0, 16)
    whole = quantise(values, blocks, "float16")
    monkeypatch.setattr("vlmforge_builder.block_quantisation._SLAB", 2000)
    for a, b in zip(whole, quantise(values, blocks, "float16"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("width", "size"),
    [(4096, 128), (11008, 128), (192, 64), (96, 32), (48, 16), (24, None), (7, None)],
)
def test_blocks_divide_the_width(width: int, size: int | None) -> None:
    for axis in (0, 1):
        shape = (width, 10) if axis == 0 else (10, width)
        found = cut(shape, 4, axis)
        assert (found.size if found else None) == size


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_two_numbers_to_a_byte(numbers: list[int]) -> None:
    packed = pack_int4(torch.tensor(numbers, dtype=torch.int8)).numpy()
    assert packed.size == -(-len(numbers) // 2)
    halves = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[: len(numbers)]
    assert halves.astype(ml_dtypes.uint4).view(ml_dtypes.int4).astype(int).tolist() == numbers


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout_of_matmul_n_bits(bits: int) -> None:
    """Unpacked by its documentation: `[N, blocks, bytes]`, numbers from 0, `2^(bits-1)` is zero."""
    values = draw_matrix(96, 32, 7)
    blocks = Blocks(bits, 0, 32)
    blob, scales = (t.numpy() for t in ForMatMulNBits(blocks).encode(values))
    numbers, by_onnx = (t.numpy() for t in quantise(values, blocks, "float32"))
    packed = blob.reshape(32, 3, 32 * bits // 8)
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1)
    unsigned = packed.reshape(32, 96).astype(int)
    np.testing.assert_array_equal(unsigned - 2 ** (bits - 1), numbers.T)
    np.testing.assert_array_equal(scales, by_onnx.T)


def test_encodings_are_written_one_after_the_other(tmp_path: Path) -> None:
    values = draw_matrix(64, 64, 1).half().float()
    shapes = dict.fromkeys(("plain", "table", "matrix"), (64, 64))
    encodings = {
        "plain": AsDtype("float16"),
        "table": InBlocks(Blocks(4, 1, 64), "float16"),
        "matrix": ForMatMulNBits(Blocks(8, 0, 32)),
    }
    layout = plan(shapes, encodings)
    data = tmp_path / "data"
    weights = {name: Computed(lambda: values) for name in shapes}
    steps = list(write(data, layout, weights, None))  # type: ignore[arg-type]
    content = data.read_bytes()
    assert steps[-1] == (len(content), len(content))
    assert weight_bytes(layout) == 2 * 4096 + (2048 + 2 * 64) + (4096 + 4 * 128)
    for item in layout:
        for place, tensor in zip(item.places, item.encoding.encode(values), strict=True):
            assert place.offset % 4096 == 0
            written = content[place.offset : place.end]
            assert written == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    values = draw_matrix(64, 32, 2)
    values[40, 3] = bad
    layout = plan({"qkv": (64, 32)}, {"qkv": InBlocks(Blocks(4, 0, 32), "float16")})
    with pytest.raises(TensorError) as caught:
        weights = {"qkv": Computed(lambda: values)}
        list(write(tmp_path / "data", layout, weights, None))  # type: ignore[arg-type]
    assert "qkv are not finite" in str(caught.value)
