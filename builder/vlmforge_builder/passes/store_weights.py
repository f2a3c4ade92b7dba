"""Give weights the dtype that they are stored in, and cast them where they are used."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
_GATHERS = {"Gather", "GatherND"}


def store_weights(model: ir.Model, dtypes: Mapping[str, str]) -> bool:
    """Set the dtype of the initialisers named in `dtypes`; arithmetic stays in float32.

    A table that is only gathered from is cast after the gather, so that only the rows in use are.
    Returns whether anything changed.
    """
    changed = False
    for name, dtype in dtypes.items():
        if dtype == "float32":
            continue
        weight = model.graph.initializers[name]
        weight.type = ir.TensorType(_TYPES[dtype])
        for node, index in tuple(weight.uses()):
            _cast_use(model.graph, weight, node, index)
        changed = True
    return changed


def _cast_use(graph: ir.Graph, weight: ir.Value, node: ir.Node, index: int) -> None:
    if node.op_type in _GATHERS and index == 0:
        rows = node.outputs[0]
        cast = _cast(rows, f"{weight.name}_rows_cast")
        rows.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, rows)
        rows.type = weight.type
        graph.insert_after(node, cast)
        return
    cast = _cast(weight, f"{weight.name}_cast_{node.name}")
    graph.insert_before(node, cast)
    node.replace_input_with(index, cast.outputs[0])


def _cast(value: ir.Value, name: str) -> ir.Node:
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=name)
    cast.outputs[0].name = name
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    cast.outputs[0].shape = value.shape
    return cast
