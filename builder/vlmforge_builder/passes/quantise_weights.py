"""Read matrices through DequantizeLinear, so that they are stored as whole numbers in blocks.

The matrix that makes the logits, and tables, keep eight bits where the others get four, as far as
they are a small share of the whole: they are the most sensitive one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
from typing_extensions import override

from vlmforge_builder.block_quantisation import Blocks, cut, scales_name
from vlmforge_builder.dtypes import BITS
from vlmforge_builder.kept_weights import KeptBlocks
from vlmforge_builder.onnx_file import unread
from vlmforge_builder.ops.dequantize_linear import DequantizeLinearNode
from vlmforge_builder.weights import Computed

if TYPE_CHECKING:
    from vlmforge_builder.recipe import PartSpec

_TYPES = {8: ir.DataType.INT8, 4: ir.DataType.INT4}
_MATRIX, _TABLE = ("MatMul", 1), ("Gather", 0)  # where a weight is an input
_ALONG = {_MATRIX: 0, _TABLE: 1}  # the axis of its blocks
_SPARED_BITS = 8
# Of all weights; four-bit weights then take at most 0.28 of 16-bit ones.
_SPARED_SHARE = 1 / 12


def blocks_of_part(graph: ir.Graph, part: PartSpec, kind: str | None) -> dict[str, Blocks]:
    """`choose_blocks` for what is quantised of a part, to `kind`, a key of `BITS`, or None.

    That is the decoder's checkpoint weights, or what is in whole numbers already. A vision tower is
    a small share of the whole, and answers suffer first from errors there.
    """
    if kind is None or part.name != "decoder":
        return {}
    if kept := {n: w.blocks for n, w in part.weights.items() if isinstance(w, KeptBlocks)}:
        return kept
    candidates = [name for name, w in part.weights.items() if not isinstance(w, Computed)]
    return choose_blocks(graph, BITS[kind], candidates)


def choose_blocks(graph: ir.Graph, bits: int, candidates: Iterable[str]) -> dict[str, Blocks]:
    """How to cut each matrix and table among the initialisers `candidates`.

    The others are those that are neither, and those whose width no block of 16 or more divides.
    """
    weights = [graph.initializers[name] for name in candidates]
    spared = _spared(weights) if bits < _SPARED_BITS else frozenset()
    chosen = {
        weight.name or "": _blocks(weight, _SPARED_BITS if weight.name in spared else bits)
        for weight in weights
    }
    return {name: blocks for name, blocks in chosen.items() if blocks is not None}


@dataclass(frozen=True)
class QuantiseWeightsPass(ir.passes.InPlacePass):
    """Put a DequantizeLinear, of the weight's type, after every initialiser that is to be cut."""

    blocks: Mapping[str, Blocks]

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name, blocks in self.blocks.items():
            _dequantize(model.graph, model.graph.initializers[name], blocks)
        return ir.passes.PassResult(model, modified=bool(self.blocks))


def _spared(weights: Sequence[ir.Value]) -> frozenset[str]:
    """Matrices of the logits, then tables, as long as they stay within their share."""
    room = sum(_size(weight) for weight in weights) * _SPARED_SHARE
    outputs = [w for w in weights if any(_makes_output(n.outputs[0]) for n, _ in w.uses())]
    spared = set()
    for weight in (*outputs, *(w for w in weights if _use(w) == _TABLE)):
        room -= _size(weight)
        if room < 0:
            break
        spared.add(weight.name or "")
    return frozenset(spared)


def _size(weight: ir.Value) -> int:
    assert weight.shape is not None
    return math.prod(weight.shape.numpy())


def _use(weight: ir.Value) -> tuple[str, int] | None:
    """The op and the place among its inputs, if it is the same everywhere."""
    uses = {(node.op_type, index) for node, index in weight.uses()}
    return uses.pop() if len(uses) == 1 else None


def _blocks(weight: ir.Value, bits: int) -> Blocks | None:
    use = _use(weight)
    if use is None or use not in _ALONG or weight.shape is None or len(weight.shape) != 2:
        return None
    return cut(weight.shape.numpy(), bits, _ALONG[use])


def _makes_output(value: ir.Value) -> bool:
    if value.is_graph_output():
        return True
    return any(n.op_type == "Cast" and _makes_output(n.outputs[0]) for n, _ in value.uses())


def _dequantize(graph: ir.Graph, weight: ir.Value, blocks: Blocks) -> None:
    name, dtype, shape = weight.name or "", weight.dtype, weight.shape
    assert dtype is not None and shape is not None
    scales_shape = ir.Shape(blocks.scales_shape(shape.numpy()))
    scales = ir.Value(
        name=scales_name(name),
        type=ir.TensorType(dtype),
        shape=scales_shape,
        const_value=unread(dtype, scales_shape),
    )
    graph.register_initializer(scales)
    result = ir.Value(name=f"{name}_dequantized", type=ir.TensorType(dtype), shape=ir.Shape(shape))
    weight.replace_all_uses_with(result)
    node = DequantizeLinearNode(
        numbers=weight, scales=scales, axis=blocks.axis, block_size=blocks.size, out=result
    )
    weight.type = ir.TensorType(_TYPES[blocks.bits])
    weight.const_value = unread(_TYPES[blocks.bits], shape)
    graph.insert_before(graph[0], node.write(f"{name}_dequantize"))
