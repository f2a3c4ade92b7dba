"""Take and give image features in float32, whatever they are calculated in.

They pass through the host, where numpy has no name for bfloat16; a cast on the GPU costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from typing_extensions import override

from vlmforge.engine.interface import IMAGE_FEATURES

_NARROW = f"{IMAGE_FEATURES}_narrow"


@dataclass(frozen=True)
class Float32FeaturesPass(ir.passes.InPlacePass):
    """Cast the features where they come in or go out, unless they are float32."""

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, changed = model.graph, False
        for value in graph.inputs:
            if value.name == IMAGE_FEATURES and value.dtype != ir.DataType.FLOAT:
                _take(graph, value)
                changed = True
        for index, value in enumerate(graph.outputs):
            if value.name == IMAGE_FEATURES and value.dtype != ir.DataType.FLOAT:
                _give(graph, index, value)
                changed = True
        return ir.passes.PassResult(model, modified=changed)


def _take(graph: ir.Graph, value: ir.Value) -> None:
    assert value.dtype is not None
    cast = ir.node("Cast", [value], attributes={"to": value.dtype}, name=_NARROW)
    made = cast.outputs[0]
    made.name, made.type, made.shape = _NARROW, value.type, value.shape
    value.replace_all_uses_with(made)
    cast.replace_input_with(0, value)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(graph[0], cast)


def _give(graph: ir.Graph, index: int, value: ir.Value) -> None:
    value.name = _NARROW
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=IMAGE_FEATURES)
    made = cast.outputs[0]
    made.name, made.shape = IMAGE_FEATURES, value.shape
    made.type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(cast)
    graph.outputs[index] = made
