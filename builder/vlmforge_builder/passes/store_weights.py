"""Give weights the dtype that they are stored in, and cast them where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from typing_extensions import override

from vlmforge_builder.passes.assign_precision import TYPES

_FLOAT = ir.DataType.FLOAT
_GATHERS = {"Gather", "GatherND"}


@dataclass(frozen=True)
class StoreWeightsPass(ir.passes.InPlacePass):
    """Set the dtypes of initialisers by their names; arithmetic stays in float32.

    A table that is only gathered from is cast after the gather, so that only the rows in use are.
    Weights that are quantised already keep their type.
    """

    dtypes: Mapping[str, str]

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        weights = {model.graph.initializers[name]: TYPES[d] for name, d in self.dtypes.items()}
        floats = {w: t for w, t in weights.items() if w.dtype == _FLOAT and t != _FLOAT}
        for weight, dtype in floats.items():
            weight.type = ir.TensorType(dtype)
            for node, index in tuple(weight.uses()):
                _cast_use(model.graph, weight, node, index)
        return ir.passes.PassResult(model, modified=bool(floats))


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
    cast = ir.node("Cast", [value], attributes={"to": _FLOAT}, name=name)
    cast.outputs[0].name = name
    cast.outputs[0].type = ir.TensorType(_FLOAT)
    cast.outputs[0].shape = value.shape
    return cast
