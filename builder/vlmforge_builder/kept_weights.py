"""Weights of an engine that is there already: as they are stored, read by slice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from vlmforge_builder.block_quantisation import Blocks, scales_name, unpack_int4
from vlmforge_builder.checkpoint.store import TensorStore
from vlmforge_builder.shares import Share, share_of
from vlmforge_builder.weights import Numbers, Weight

_FLIPPED = {8: 0x80, 4: 0x88}  # `ForMatMulNBits` stores numbers without sign


@dataclass(frozen=True, slots=True)
class Kept(Weight):
    """A tensor of floats as an engine has it, in its own dtype."""

    key: str
    dtype: str

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    @override
    def kept_dtype(self) -> str:
        return self.dtype

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        del shape
        return store.read(self.key)


@dataclass(frozen=True, slots=True)
class KeptBlocks(Weight):
    """A matrix or table in whole numbers, as an engine for ONNX Runtime has it.

    Matrices `[K, N]` are in blocks along K and stored as `ForMatMulNBits` says; tables are in
    blocks along their rows and stored as `InBlocks` says.
    """

    key: str
    blocks: Blocks

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.key, scales_name(self.key))

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Numbers:
        return self.read_share(store, shape, Share(0, ((0, shape[0]),)))

    @override
    def read_share(self, store: TensorStore, shape: tuple[int, ...], share: Share) -> Numbers:
        """Of shares of rows of a matrix, those that begin and end where blocks do."""
        stored, scales = store.read(self.key), store.read(scales_name(self.key))
        if self.blocks.axis == 1:
            stored = stored.reshape(shape[0], -1)
            kept = share_of((scales,), share)
            kept[len(kept) - share.padding :] = 1  # as it is of zeroes
            return self._table(share_of((stored,), share), kept)
        # Stored as [N, blocks, bytes] and [N, blocks]: both axes of the matrix are turned about.
        (start, stop), *_ = share.ranges
        size = self.blocks.size
        if share.axis == 0:
            span = slice(start // size, stop // size)
            return self._matrix(stored[:, span], scales[:, span])
        spans = [slice(*span) for span in share.ranges]
        made = self._matrix(
            torch.cat([stored[span] for span in spans]), torch.cat([scales[span] for span in spans])
        )
        rows, few = made.numbers.shape[0], made.scales.shape[0]
        return Numbers(
            torch.cat((made.numbers, made.numbers.new_zeros(rows, share.padding)), dim=1),
            torch.cat((made.scales, made.scales.new_ones(few, share.padding)), dim=1),
        )

    def _matrix(self, stored: Tensor, scales: Tensor) -> Numbers:
        signed = stored ^ _FLIPPED[self.blocks.bits]
        numbers = signed.view(torch.int8) if self.blocks.bits == 8 else unpack_int4(signed)
        return Numbers(numbers.flatten(1).T, scales.T)

    def _table(self, stored: Tensor, scales: Tensor) -> Numbers:
        numbers = unpack_int4(stored) if self.blocks.bits == 4 else stored
        return Numbers(numbers, scales)
