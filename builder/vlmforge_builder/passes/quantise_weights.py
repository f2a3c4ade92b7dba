"""Read matrices through DequantizeLinear, so that they are stored as whole numbers in blocks.

Tables and the matrix that makes the logits keep eight bits even where the others get four: they
are a small share of a large model, and the most sensitive one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import onnx_ir as ir

from vlmforge_builder.block_quantisation import Blocks, cut, scales_name
from vlmforge_builder.dtypes import BITS
from vlmforge_builder.onnx_file import unread
from vlmforge_builder.weights import Computed

if TYPE_CHECKING:
    from vlmforge_builder.recipe import PartSpec

_TYPES = {8: ir.DataType.INT8, 4: ir.DataType.INT4}
_MATRIX, _TABLE = ("MatMul", 1), ("Gather", 0)  # where a weight is an input
_ALONG = {_MATRIX: 0, _TABLE: 1}  # the axis of its blocks


def quantise_part(model: ir.Model, part: PartSpec, kind: str | None) -> dict[str, Blocks]:
    """`quantise_weights` of what is quantised of a part, to `kind`, a key of `BITS`, or None.

    That is the decoder's checkpoint weights. A vision tower is a small share of the whole, and
    answers suffer first from errors there.
    """
    if kind is None or part.name != "decoder":
        return {}
    candidates = [name for name, w in part.weights.items() if not isinstance(w, Computed)]
    return quantise_weights(model, BITS[kind], candidates)


def quantise_weights(model: ir.Model, bits: int, candidates: Iterable[str]) -> dict[str, Blocks]:
    """Put a DequantizeLinear after every matrix and table among the initialisers `candidates`.

    Its result has the type that the weight had. Returns how each quantised weight is cut; the
    others are those that are neither, and those whose width no block of 16 or more divides.
    """
    made = {}
    for name in candidates:
        weight = model.graph.initializers[name]
        if (blocks := _blocks(weight, bits)) is not None:
            _dequantize(model.graph, weight, blocks)
            made[name] = blocks
    return made


def _blocks(weight: ir.Value, bits: int) -> Blocks | None:
    shape = weight.shape.numpy() if weight.shape is not None else ()
    uses = {(node.op_type, index) for node, index in weight.uses()}
    if len(shape) != 2 or len(uses) != 1:
        return None
    (use,) = uses
    if use not in _ALONG:
        return None
    at_the_end = use == _TABLE or any(_makes_output(node.outputs[0]) for node, _ in weight.uses())
    return cut(shape, 8 if at_the_end else bits, _ALONG[use])


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
    node = ir.node(
        "DequantizeLinear",
        [weight, scales],
        attributes={"axis": blocks.axis, "block_size": blocks.size},
        name=f"{name}_dequantize",
    )
    result = node.outputs[0]
    result.name, result.type, result.shape = f"{name}_dequantized", ir.TensorType(dtype), shape
    weight.replace_all_uses_with(result)
    node.replace_input_with(0, weight)
    weight.type = ir.TensorType(_TYPES[blocks.bits])
    weight.const_value = unread(_TYPES[blocks.bits], shape)
    graph.insert_before(graph[0], node)
