"""Lower DequantizeLinear of weights to what ONNX Runtime's CPU provider has kernels for.

A matrix and its product become one MatMulNBits, so that decoding reads the whole numbers alone. It
rounds each block of activations to eight bits (`accuracy_level` 4): only that has fast kernels for
both widths, and it loses less than the weights did. Of a table only the rows in use are
dequantised.
"""

from __future__ import annotations

import onnx_ir as ir

from vlmforge_builder.onnx_file import unread

DOMAIN = "com.microsoft"
_EIGHT_BIT_ACTIVATIONS = 4


def lower_dequantize(model: ir.Model, *, accuracy_level: int = _EIGHT_BIT_ACTIVATIONS) -> bool:
    """Replace every blocked DequantizeLinear of a weight; returns whether there was one.

    The initialisers of matrices get the shapes that `ForMatMulNBits` writes; those of tables stay.
    """
    graph = model.graph
    found = [node for node in graph if node.op_type == "DequantizeLinear"]
    for node in found:
        for user, _ in tuple(node.outputs[0].uses()):
            if user.op_type == "MatMul":
                _lower_product(graph, node, user, accuracy_level)
            else:
                _lower_rows(graph, node, user)
        graph.remove(node, safe=True)
    if found:
        model.opset_imports[DOMAIN] = 1
    return bool(found)


def _lower_product(graph: ir.Graph, node: ir.Node, product: ir.Node, accuracy_level: int) -> None:
    weight, scales = _weights(node)
    assert node.outputs[0].shape is not None
    inputs, outputs = node.outputs[0].shape.numpy()
    size = node.attributes["block_size"].as_int()
    bits = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}[weight.dtype or ir.DataType.INT8]
    lowered = ir.node(
        "MatMulNBits",
        [product.inputs[0], weight, scales],
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
    _reshape(weight, ir.DataType.UINT8, (outputs, inputs // size, size * bits // 8))
    _reshape(scales, ir.DataType.FLOAT, (outputs, inputs // size))


def _reshape(value: ir.Value, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    value.const_value = unread(dtype, value.shape)


def _lower_rows(graph: ir.Graph, node: ir.Node, gather: ir.Node) -> None:
    """`Gather(DequantizeLinear(table))` to the same of the rows that are gathered."""
    weight, scales = _weights(node)
    size, indices = node.attributes["block_size"].as_int(), gather.inputs[1]
    if weight.dtype == ir.DataType.INT4:  # which Gather does not take
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": size}
        inputs = [weight, indices, scales]
        made = [ir.node("GatherBlockQuantized", inputs, domain=DOMAIN, attributes=attributes)]
    else:
        made = [ir.node("Gather", [value, indices]) for value in (weight, scales)]
        rows, rank = [node.outputs[0] for node in made], len(gather.outputs[0].shape or ())
        attributes = {"axis": rank - 1, "block_size": size}
        made.append(ir.node("DequantizeLinear", rows, attributes=attributes))
    for index, lowered in enumerate(made):
        lowered.name = lowered.outputs[0].name = f"{gather.name}_dequantized_{index}"
    ir.convenience.replace_nodes_and_values(
        graph, gather, [gather], made, gather.outputs, made[-1].outputs
    )


def _weights(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    weight, scales = node.inputs[:2]
    assert weight is not None and scales is not None
    return weight, scales
