"""Lower DequantizeLinear of weights to what ONNX Runtime has kernels for.

A matrix and its product become one MatMulNBits, so that decoding reads the whole numbers alone. On
processors it rounds each block of activations to eight bits (`accuracy_level` 4): only that has
fast kernels for both widths, and it loses less than the weights did. Of a table only the rows in
use are dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from typing_extensions import override

from vlmforge_builder.onnx_file import unread
from vlmforge_builder.ops.dequantize_linear import DequantizeLinearNode

DOMAIN = "com.microsoft"
_EIGHT_BIT_ACTIVATIONS = 4


@dataclass(frozen=True)
class LowerDequantizePass(ir.passes.InPlacePass):
    """Replace every blocked DequantizeLinear of a weight.

    The initialisers of matrices get the shapes that `ForMatMulNBits` writes; those of tables stay.
    `accuracy_level` 0 leaves activations as they are.
    """

    accuracy_level: int = _EIGHT_BIT_ACTIVATIONS

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = DequantizeLinearNode.all_in(model.graph)
        for weight in found:
            for user, _ in tuple(weight.out.uses()):
                if user.op_type == "MatMul":
                    _lower_product(model.graph, weight, user, self.accuracy_level)
                else:
                    _lower_rows(model.graph, weight, user)
            model.graph.remove(weight.node, safe=True)
        if found:
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=bool(found))


def _lower_product(
    graph: ir.Graph, weight: DequantizeLinearNode, product: ir.Node, accuracy_level: int
) -> None:
    assert weight.out.shape is not None
    inputs, outputs = weight.out.shape.numpy()
    size = weight.block_size
    bits = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}[weight.numbers.dtype or ir.DataType.INT8]
    lowered = ir.node(
        "MatMulNBits",
        [product.inputs[0], weight.numbers, weight.scales],
        domain=DOMAIN,
        attributes={
            "K": inputs,
            "N": outputs,
            "bits": bits,
            "block_size": size,
            "accuracy_level": accuracy_level,
        },
        name=product.name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, product, [product], [lowered], product.outputs, lowered.outputs
    )
    _reshape(weight.numbers, ir.DataType.UINT8, (outputs, inputs // size, size * bits // 8))
    scale_dtype = weight.scales.dtype or ir.DataType.FLOAT
    _reshape(weight.scales, scale_dtype, (outputs, inputs // size))


def _reshape(value: ir.Value, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    value.const_value = unread(dtype, value.shape)


def _lower_rows(graph: ir.Graph, table: DequantizeLinearNode, gather: ir.Node) -> None:
    """`Gather(DequantizeLinear(table))` to the same of the rows that are gathered."""
    size, indices = table.block_size, gather.inputs[1]
    if table.numbers.dtype == ir.DataType.INT4:  # which Gather does not take
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": size}
        inputs = [table.numbers, indices, table.scales]
        made = [ir.node("GatherBlockQuantized", inputs, domain=DOMAIN, attributes=attributes)]
    else:
        made = [ir.node("Gather", [value, indices]) for value in (table.numbers, table.scales)]
        rows, rank = [node.outputs[0] for node in made], len(gather.outputs[0].shape or ())
        attributes = {"axis": rank - 1, "block_size": size}
        made.append(ir.node("DequantizeLinear", rows, attributes=attributes))
    for index, lowered in enumerate(made):
        lowered.name = lowered.outputs[0].name = f"{gather.name}_dequantized_{index}"
    ir.convenience.replace_nodes_and_values(
        graph, gather, [gather], made, gather.outputs, made[-1].outputs
    )
