"""Shares of weights: exactly the slices, read from nothing else; whole numbers as they were."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmforge_builder.block_quantisation import (
    Blocks,
    ForMatMulNBits,
    InBlocks,
    pack_int4,
    quantise,
    unpack_int4,
)
from vlmforge_builder.checkpoint.store import TensorInfo, TensorStore
from vlmforge_builder.divided_part import RowsOfBlocks
from vlmforge_builder.kept_weights import KeptBlocks
from vlmforge_builder.shares import Share, joined
from vlmforge_builder.weights import Numbers, Sliced, Stacked, Transposed


@dataclass(frozen=True)
class Tensors(TensorStore):
    """Tensors by name."""

    values: dict[str, torch.Tensor]

    def names(self) -> tuple[str, ...]:
        return tuple(self.values)

    def info(self, name: str) -> TensorInfo:
        shape = tuple(self.values[name].shape)
        return TensorInfo(name, "float32", shape, None)  # type: ignore[arg-type]

    def read(self, name: str) -> torch.Tensor:
        return self.values[name]

    def __contains__(self, name: object) -> bool:
        return name in self.values


@st.composite
def spans(draw: st.DrawFn, size: int) -> tuple[tuple[int, int], ...]:
    """Ranges that may repeat each other, as heads do that several ranks hold."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, size - 1))
        found.append((start, draw(st.integers(start + 1, size))))
    return tuple(found)


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2))
def test_a_share_is_the_slices(data: st.DataObject, widths: list[int], padding: int) -> None:
    rng = np.random.default_rng(len(widths))
    rows, columns, axis = 4, sum(widths), data.draw(st.integers(0, 1))
    keys = tuple(f"m{i}" for i in range(len(widths)))
    stored = {
        key: torch.from_numpy(rng.standard_normal((width, rows)))
        for key, width in zip(keys, widths, strict=True)
    }
    whole = torch.cat([stored[key].T for key in keys], dim=1).numpy()
    ranges = data.draw(spans((rows, columns)[axis]))
    share = Share(axis, ranges, padding)
    kept = [np.take(whole, range(*span), axis) for span in ranges]
    zeroes = np.zeros(((padding, columns), (rows, padding))[axis])
    expected = np.concatenate([*kept, zeroes], axis)
    weight = Sliced(Transposed(keys, tuple(widths)), (rows, columns), share)
    found = weight.read(Tensors(stored), expected.shape)
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert share.shape((rows, columns)) == expected.shape
    assert weight.names == keys
    if axis == 1:  # and of the bias beside it
        biases = {key: tensor[:, 0] for key, tensor in stored.items()}
        vector = Sliced(Stacked(keys, tuple(widths)), (columns,), replace_axis(share))
        found = vector.read(Tensors(biases), (expected.shape[1],))
        assert isinstance(found, torch.Tensor)
        np.testing.assert_array_equal(found.numpy(), expected[0])


def replace_axis(share: Share) -> Share:
    return Share(0, share.ranges, share.padding)


def test_nothing_beside_a_share_is_looked_at() -> None:
    """A rank's rows are a view of the file's pages; of columns only these are copied."""
    matrix = torch.arange(24.0).reshape(6, 4)
    store, weight = Tensors({"m": matrix}), Transposed(("m",), (6,))
    rows = Sliced(weight, (4, 6), Share(0, ((1, 3),))).read(store, (2, 6))
    assert isinstance(rows, torch.Tensor)
    assert rows.data_ptr() == matrix[:, 1:].data_ptr()
    columns = Sliced(weight, (4, 6), Share(1, ((2, 5),))).read(store, (4, 3))
    assert isinstance(columns, torch.Tensor)
    assert columns.data_ptr() == matrix[2:].data_ptr()


def test_ranges_that_follow_each_other_are_one() -> None:
    assert joined(iter([(0, 2), (2, 3), (2, 3), (5, 6), (6, 9)])) == ((0, 3), (2, 3), (5, 9))


# --- whole numbers ------------------------------------------------------------------------------

BITS = st.sampled_from([4, 8])


def drawn_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


def worth(numbers: torch.Tensor, scales: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    return numbers.float() * scales.repeat_interleave(size, dim=axis)


def stored_by(encoding: ForMatMulNBits | InBlocks | RowsOfBlocks, values: torch.Tensor) -> Tensors:
    """What a data file would hold; four-bit tables as the bytes that they are."""
    made = {}
    described = encoding.tensors("w", tuple(values.shape))
    for tensor, content in zip(described, encoding.encode(values), strict=True):
        shape = tensor.shape if tensor.dtype != "int4" else (tensor.shape[0], -1)
        assert tensor.size == content.nbytes
        made[tensor.name] = content.contiguous().reshape(shape)
    return Tensors(made)


@settings(max_examples=25)
@given(BITS, st.sampled_from([32, 64, 128]), st.sampled_from([2, 4]), st.integers(1, 3))
def test_a_block_that_a_border_cuts_becomes_smaller_ones(
    bits: int, size: int, tp: int, count: int
) -> None:
    rows = size * count
    own, finer = rows // tp, np.gcd(size, rows // tp)
    if finer < 16:
        return
    values, whole = drawn_matrix(rows, 3), Blocks(bits, 0, size)
    expected = worth(*quantise(values, whole, "float32"), size, 0)
    for rank in range(tp):
        start = rank * own
        first, last = start // size * size, -(-(start + own) // size) * size
        inner = ForMatMulNBits(Blocks(bits, 0, int(finer)))
        encoding = RowsOfBlocks(inner, whole, start - first, own)
        store = stored_by(encoding, values[first:last])
        found = KeptBlocks("w", inner.blocks).read(store, (own, 3))
        made = worth(found.numbers, found.scales, int(finer), 0)
        torch.testing.assert_close(made, expected[start : start + own], rtol=0, atol=0)


@settings(max_examples=25)
@given(BITS, st.data())
def test_whole_numbers_of_an_engine_are_read_as_they_were(bits: int, data: st.DataObject) -> None:
    rows, columns, size = 64, 6, 16
    values, blocks = drawn_matrix(rows, columns), Blocks(bits, 0, size)
    numbers, scales = quantise(values, blocks, "float32")
    store = stored_by(ForMatMulNBits(blocks), values)
    ranges, padding = data.draw(spans(columns)), data.draw(st.integers(0, 2))
    found = KeptBlocks("w", blocks).read_share(store, (rows, columns), Share(1, ranges, padding))
    wanted = [numbers[:, start:stop] for start, stop in ranges]
    torch.testing.assert_close(
        found.numbers, torch.cat([*wanted, numbers.new_zeros(rows, padding)], dim=1)
    )
    kept = found.scales[:, : found.scales.shape[1] - padding]
    torch.testing.assert_close(kept, torch.cat([scales[:, a:b] for a, b in ranges], dim=1))
    start = data.draw(st.integers(0, 3))
    part = KeptBlocks("w", blocks).read_share(
        store, (rows, columns), Share(0, ((start * size, rows),))
    )
    torch.testing.assert_close(part.numbers, numbers[start * size :])
    torch.testing.assert_close(part.scales, scales[start:])
    # And they are written again as they were.
    again = ForMatMulNBits(blocks).encode(KeptBlocks("w", blocks).read(store, (rows, columns)))
    for tensor, name in zip(again, store.values, strict=True):
        assert torch.equal(tensor.flatten(), store.values[name].flatten())


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_a_table_are_read_as_they_were(bits: int) -> None:
    values, blocks = drawn_matrix(5, 32), Blocks(bits, 1, 16)
    numbers, scales = quantise(values, blocks, "float32")
    store = stored_by(InBlocks(blocks, "float32"), values)
    found = KeptBlocks("w", blocks).read_share(store, (5, 32), Share(0, ((3, 5),), 1))
    assert isinstance(found, Numbers)
    assert found.shape == (3, 32)
    torch.testing.assert_close(found.numbers[:2], numbers[3:])
    torch.testing.assert_close(found.scales[:2], scales[3:])
    zeroes = quantise(torch.zeros(1, 32), blocks, "float32")
    torch.testing.assert_close((found.numbers[2:], found.scales[2:]), zeroes)
    torch.testing.assert_close(store.values["w_scales"], scales)


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=20).filter(lambda n: len(n) % 2 == 0))
def test_four_bits_are_unpacked_as_they_were_packed(numbers: list[int]) -> None:
    tensor = torch.tensor(numbers, dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(tensor)), tensor)
