"""What tracing leaves behind, and that its graph is held against the runtime's list."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from vlmforge.engine.interface import BLOCK_TABLE, VisionInterface
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import BuildError
from vlmforge_builder.export import trace
from vlmforge_builder.onnx_file import add_input, check_interface, tensor_specs


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_off_while_tracing_and_then_as_it_was(enabled: bool) -> None:
    seen = []

    def module() -> Any:
        seen.append(gc.isenabled())
        raise ValueError("no module")

    part: Any = SimpleNamespace(module=module)
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ValueError, match="no module"):
            trace(part)
        assert (seen, gc.isenabled()) == ([False], enabled)
    finally:
        gc.enable()


def graph_of(*listed: TensorSpec) -> ir.Graph:
    graph = ir.Graph([], [], nodes=[])
    for spec in listed:
        add_input(graph, spec)
    return graph


def test_an_input_of_the_list_is_added_as_it_is_listed() -> None:
    assert tensor_specs(graph_of(BLOCK_TABLE).inputs) == (BLOCK_TABLE,)


def test_a_graph_that_takes_something_else_is_refused() -> None:
    listed = VisionInterface((8, 8), 4, 16)
    graph = graph_of(*listed.inputs)
    graph.outputs.append(ir.Value(name="rows", type=ir.TensorType(ir.DataType.FLOAT)))
    with pytest.raises(BuildError, match="not those that the runtime will bind") as caught:
        check_interface(graph, listed)
    assert "name='rows'" in str(caught.value.found)
    assert "name='image_features'" in str(caught.value.expected)
    graph.outputs.clear()
    (features,) = listed.outputs
    made = ir.Value(name=features.name, type=ir.TensorType(ir.DataType.FLOAT))
    made.shape = ir.Shape(features.shape)
    graph.outputs.append(made)
    check_interface(graph, listed)
    graph.outputs[0].shape = ir.Shape(["images", 5, 16])
    with pytest.raises(BuildError, match="not those that the runtime will bind"):
        check_interface(graph, listed)
