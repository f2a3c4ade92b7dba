"""A rank's part of a decoder: its graph, and where its weights are, by slices of the checkpoint's.

Whole numbers are those that one rank would have: blocks are cut where they end, or a block that a
border goes through becomes smaller ones of the same scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from msgspec import structs
from torch import Tensor
from typing_extensions import override

from vlmforge.engine.interface import DecoderInterface, cache_names
from vlmforge.errors import ConfigError
from vlmforge_builder.block_quantisation import (
    SMALLEST_BLOCK,
    Blocks,
    ForMatMulNBits,
    InBlocks,
    quantised,
)
from vlmforge_builder.export import Traced
from vlmforge_builder.passes.shard import shard
from vlmforge_builder.ranks import WHOLE, Rank
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.shares import Share
from vlmforge_builder.weights import Computed, Encoding, Sliced, TensorShape, Values, Weight


@dataclass(frozen=True, slots=True)
class RowsOfBlocks(Encoding):
    """`Encoding` of some rows of a matrix that was cut into wider blocks than theirs.

    Attributes:
        inner: Of the rows, in their own blocks.
        whole: The blocks of the whole matrix; the values given are of all that the rows touch.
        skipped: Rows of the first of them that are another rank's.
        rows: How many are kept behind those.
    """

    inner: ForMatMulNBits | InBlocks
    whole: Blocks
    skipped: int
    rows: int

    @override
    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorShape, ...]:
        return self.inner.tensors(name, (self.rows, *shape[1:]))

    @override
    def encode(self, values: Values) -> tuple[Tensor, ...]:
        size = self.inner.blocks.size
        numbers, scales = quantised(values, self.whole, self.inner.scale_dtype)
        finer = scales.repeat_interleave(self.whole.size // size, dim=0)
        first, count = self.skipped // size, self.rows // size
        kept = numbers[self.skipped : self.skipped + self.rows]
        return self.inner.lay_out(kept, finer[first : first + count])


@dataclass(frozen=True, slots=True)
class DividedPart:
    """What a target compiles for one rank; `shapes` and `blocks` by the names of the weights."""

    part: PartSpec
    shapes: Mapping[str, tuple[int, ...]]
    blocks: Mapping[str, Blocks]
    rows: Mapping[str, tuple[Blocks, int, int]]

    def encoding(self, name: str, inner: Encoding) -> Encoding:
        """How a weight is written, if it is `inner` but for the borders of blocks."""
        if name not in self.rows:
            return inner
        assert isinstance(inner, ForMatMulNBits | InBlocks)
        return RowsOfBlocks(inner, *self.rows[name])


def divide_part(
    traced: Traced, part: PartSpec, blocks: Mapping[str, Blocks], rank: Rank, *, rounded: bool
) -> DividedPart:
    """Leave the rank's part in the traced graph; `blocks` are those of the whole weights.

    `rounded` tells whether products with those round what they take too, as `shard` has it.

    Raises:
        ConfigError: heads, columns or blocks that cannot be divided by the ranks.
        BuildError: a decoder of a form that is not known.
    """
    if rank == WHOLE:
        return DividedPart(part, traced.shapes, blocks, {})
    divisible = [name for name, w in part.weights.items() if not isinstance(w, Computed)]
    sizes = {name: cut.size for name, cut in blocks.items()}
    shares = shard(traced.model.graph, divisible, rank, sizes, rounded=rounded)
    weights: dict[str, Weight] = dict(part.weights)
    shapes, finer, rows = dict(traced.shapes), dict(blocks), {}
    for name, share in shares.items():
        cut = blocks.get(name)
        if cut is not None and cut.axis == share.axis:
            finer[name], share, rows[name] = _touched(name, cut, share, rank)
            if finer[name] == cut:
                del rows[name]
        weights[name] = Sliced(weights[name], shapes[name], share)
        shapes[name] = share.shape(shapes[name])
    interface = part.interface
    assert isinstance(interface, DecoderInterface)
    kv = structs.replace(interface.kv, kv_heads=_kv_heads(traced.model.graph, interface))
    interface = structs.replace(interface, kv=kv)
    divided = dataclasses.replace(part, weights=weights, interface=interface)
    return DividedPart(divided, shapes, finer, rows)


def _kv_heads(graph: ir.Graph, interface: DecoderInterface) -> int:
    first = cache_names(interface.kv)[0]
    shape = next(value.shape for value in graph.inputs if value.name == first)
    assert shape is not None
    return int(shape[1])  # type: ignore[arg-type]


def _touched(
    name: str, cut: Blocks, share: Share, rank: Rank
) -> tuple[Blocks, Share, tuple[Blocks, int, int]]:
    """The rank's own blocks; its share with all blocks of the whole that it touches; what of it."""
    ((start, stop),) = share.ranges
    size = math.gcd(cut.size, start, stop)
    if size < SMALLEST_BLOCK:
        raise ConfigError(
            f"The blocks of {name} cannot be divided among {rank.of} ranks.",
            found=f"rows {start} to {stop} of a rank, in blocks of {cut.size}",
            expected=f"borders at multiples of {SMALLEST_BLOCK}",
            fix="a smaller --tp, or no --weights",
        )
    first = start // cut.size * cut.size
    last = -(-stop // cut.size) * cut.size
    own = dataclasses.replace(cut, size=size)
    return own, Share(share.axis, ((first, last),)), (cut, start - first, stop - start)
