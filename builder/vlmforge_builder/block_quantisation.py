"""Weight-only quantisation: whole numbers in blocks of one matrix, one scale each, no zero point.

A weight is `number * scale`. This is ONNX's blocked DequantizeLinear without a zero point
(https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html), the one form that every target takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from vlmforge_builder.weights import DTYPES, Encoding, Numbers, TensorShape, Values

BLOCK = 128
SMALLEST_BLOCK = 16
# Four bits gain more from finer steps than they lose on a block's few largest weights: shares of
# the block's largest weight that may become the largest number.
_SHARES = {8: (1.0,), 4: (1.0, 0.92, 0.84, 0.76, 0.68)}
_SLAB = 1 << 22  # weights at a time, so that temporaries stay small


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a matrix is cut: `size` neighbours along `axis` (0 or 1) share a scale."""

    bits: int
    axis: int
    size: int

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a matrix of `shape`."""
        return tuple(n // self.size if i == self.axis else n for i, n in enumerate(shape))


def cut(shape: tuple[int, ...], bits: int, axis: int) -> Blocks | None:
    """Blocks of 128 along `axis`, of less where 128 does not divide it; None below 16."""
    size = BLOCK
    while shape[axis] % size:
        size //= 2
    return Blocks(bits, axis, size) if size >= SMALLEST_BLOCK else None


def quantised(values: Values, blocks: Blocks, scale_dtype: str) -> tuple[Tensor, Tensor]:
    """`quantise`, of what is not in whole numbers yet."""
    if isinstance(values, Numbers):
        return values.numbers, values.scales.to(DTYPES[scale_dtype])
    return quantise(values, blocks, scale_dtype)


def quantise(values: Tensor, blocks: Blocks, scale_dtype: str) -> tuple[Tensor, Tensor]:
    """Whole numbers (int8, of `values`' shape) and scales (positive, in `scale_dtype`).

    The scale of a block is the one of a few whose squared error is least. Values that are not
    finite give scales that are not.
    """
    axis, lines = blocks.axis, values.shape[1 - blocks.axis]
    step = blocks.size * max(1, _SLAB // (blocks.size * lines))
    # In the order of the values in memory: what is a view of the checkpoint's needs no copy later.
    numbers = torch.empty_like(values, dtype=torch.int8)
    scales = torch.empty(blocks.scales_shape(tuple(values.shape)), dtype=DTYPES[scale_dtype])
    for start in range(0, values.shape[axis], step):
        size = min(step, values.shape[axis] - start)
        found, scale = _quantise(values.narrow(axis, start, size), blocks, scales.dtype)
        numbers.narrow(axis, start, size).copy_(found)
        scales.narrow(axis, start // blocks.size, size // blocks.size).copy_(scale)
    return numbers, scales


def _quantise(values: Tensor, blocks: Blocks, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    axis, most = blocks.axis, 2 ** (blocks.bits - 1) - 1
    grouped = torch.unflatten(values.float(), axis, (-1, blocks.size))
    within = axis + 1
    largest = grouped.abs().amax(within, keepdim=True)
    best = torch.full_like(largest, torch.inf)
    chosen = torch.zeros_like(grouped)
    scales = torch.ones_like(largest).to(scale_dtype)
    for share in _SHARES[blocks.bits]:
        # What is stored is what is divided by. A block of zeroes, or of next to nothing, is zero.
        scale = (largest * (share / most)).to(scale_dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        numbers = (grouped / scale.float()).round().clamp(-most - 1, most)
        error = (numbers * scale.float() - grouped).square().sum(within, keepdim=True)
        better = ~(error >= best)  # true of NaN too: it is to be seen in the scale
        best = torch.where(better, error, best)
        chosen = torch.where(better, numbers, chosen)
        scales = torch.where(better, scale, scales)
    return chosen.to(torch.int8).flatten(axis, within), scales.squeeze(within)


def pack_int4(numbers: Tensor) -> Tensor:
    """Numbers -8..7 (int8) two to a byte (uint8), the first in the low half, in row-major order."""
    flat = numbers.flatten()
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    low, high = flat.view(torch.uint8)[::2], flat.view(torch.uint8)[1::2]
    packed = high << 4
    packed |= low & 15
    return packed


def unpack_int4(packed: Tensor) -> Tensor:
    """What `pack_int4` made of numbers, for each row `[..., n]` of bytes `[..., 2 * n]` numbers."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return (pairs ^ 8).view(torch.int8) - 8


def scales_name(name: str) -> str:
    """Name of the tensor that holds the scales of the weight `name`."""
    return f"{name}_scales"


@dataclass(frozen=True, slots=True)
class InBlocks(Encoding):
    """`Encoding` of a quantised weight as DequantizeLinear takes it."""

    blocks: Blocks
    scale_dtype: str

    @override
    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorShape, ...]:
        return (
            TensorShape(name, f"int{self.blocks.bits}", shape),
            TensorShape(scales_name(name), self.scale_dtype, self.blocks.scales_shape(shape)),
        )

    @override
    def encode(self, values: Values) -> tuple[Tensor, ...]:
        return self.lay_out(*quantised(values, self.blocks, self.scale_dtype))

    def lay_out(self, numbers: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        """What `quantise` gives, as it is stored."""
        return numbers if self.blocks.bits == 8 else pack_int4(numbers), scales


@dataclass(frozen=True, slots=True)
class ForMatMulNBits(Encoding):
    """`Encoding` of a quantised matrix `[K, N]` as ONNX Runtime's MatMulNBits takes it.

    Numbers are stored without sign, `[N, K / size, size * bits / 8]` bytes; scales `[N, K / size]`
    in the dtype of the activations, which is float32 on processors
    (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
    """

    blocks: Blocks
    scale_dtype: str = "float32"

    @override
    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorShape, ...]:
        width, size = shape[0] // self.blocks.size, self.blocks.size * self.blocks.bits // 8
        return (
            TensorShape(name, "uint8", (shape[1], width, size)),
            TensorShape(scales_name(name), self.scale_dtype, (shape[1], width)),
        )

    @override
    def encode(self, values: Values) -> tuple[Tensor, ...]:
        return self.lay_out(*quantised(values, self.blocks, self.scale_dtype))

    def lay_out(self, numbers: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        """What `quantise` gives, as it is stored."""
        rows = numbers.T.contiguous()
        if self.blocks.bits == 8:
            return rows.view(torch.uint8) ^ 0x80, scales.T  # flips the sign: adds 128
        packed = pack_int4(rows)
        packed ^= 0x88  # the same for both halves: adds 8
        return packed, scales.T
