"""The native lowering of the cached attention ops: standard ops that ONNX Runtime runs as well."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from dense_attention import (
    OUTPUTS,
    Array,
    Arrays,
    Shape,
    attention_node,
    close,
    heads,
    model_of,
    ragged,
    reference,
    run_body,
    session,
)
from vlmforge_builder.ops import DOMAIN
from vlmforge_builder.passes.native_attention import OPSET, NativeAttentionPass

shapes = st.one_of(
    ragged,
    st.builds(Shape, past=st.just((0,)), tokens=st.integers(1, 24), **heads),
    st.builds(
        Shape,
        past=st.lists(st.integers(0, 30), min_size=1, max_size=4).map(tuple),
        tokens=st.just(1),
        **heads,
    ),
)
SMALL = Shape(kv_heads=2, group=2, head_dim=16, past=(5, 0, 9), tokens=3, slack=4, seed=1)


def model_with_shapes(shape: Shape, inputs: Arrays, dtype: ir.DataType) -> ir.Model:
    """One op, its caches declared as a trace declares them: batch and capacity vary."""
    model = model_of([attention_node(shape, ("query", "key", "value"))], inputs, OUTPUTS)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name not in ("cos", "sin", "past_lengths"):
            value.type = ir.TensorType(dtype)
        if value.name is not None and value.name.startswith(("past_k", "past_v", "present")):
            value.shape = ir.Shape(["batch", shape.kv_heads, "capacity", shape.head_dim])
    return model


def lowered(shape: Shape, inputs: Arrays, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    model = model_with_shapes(shape, inputs, dtype)
    lower = Sequential(NativeAttentionPass(shape.capacity), RemoveUnusedOpsetsPass())
    assert lower(model).modified
    return model


def run(model: ir.Model, inputs: Arrays) -> list[Array]:
    made = session(model)
    assert [item.name for item in made.get_outputs()] == list(OUTPUTS)
    return list(made.run(None, inputs))


@settings(max_examples=40)
@given(shapes)
def test_the_lowering_equals_the_body_and_the_reference(shape: Shape) -> None:
    inputs = shape.inputs()
    found = run(lowered(shape, inputs), inputs)
    body = run_body(model_with_shapes(shape, inputs, ir.DataType.FLOAT), inputs)
    close(found, body)
    close(found, reference(shape, inputs))


@pytest.mark.parametrize("plain", [False, True])
def test_only_standard_ops_of_opset_24_are_left(plain: bool) -> None:
    shape = replace(SMALL, plain=plain)
    model = lowered(shape, shape.inputs())
    assert dict(model.opset_imports) == {"": OPSET} == {"": 24}
    ops = [node.op_type for node in model.graph]
    assert {node.domain for node in model.graph} == {""}
    assert DOMAIN not in model.opset_imports
    assert ops.count("RotaryEmbedding") == (0 if plain else 2)
    assert (ops.count("TensorScatter"), ops.count("Attention")) == (2, 1)


def test_the_capacity_becomes_a_fixed_dimension() -> None:
    model = lowered(SMALL, SMALL.inputs())
    caches = [
        value
        for value in (*model.graph.inputs, *model.graph.outputs)
        if value.name in ("past_key", "past_value", "present_key", "present_value")
    ]
    assert len(caches) == 4
    for value in caches:
        assert value.shape is not None
        assert value.shape[0] == "batch"
        assert list(value.shape)[1:] == [SMALL.kv_heads, SMALL.capacity, SMALL.head_dim]


def test_the_mask_is_given_and_no_length_input_is_used() -> None:
    model = lowered(SMALL, SMALL.inputs())
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert len([value for value in attention.inputs if value is not None]) == 4
    assert "is_causal" not in attention.attributes
    producer = attention.inputs[3].producer()
    assert producer is not None
    assert producer.op_type == "LessOrEqual"


def test_two_ops_share_positions_and_mask() -> None:
    inputs = SMALL.inputs()
    doubled = {**inputs, "past_key_b": inputs["past_key"], "past_value_b": inputs["past_value"]}
    nodes = [
        attention_node(SMALL, ("query", "key", "value")),
        attention_node(SMALL, ("out", "key", "value"), "_b"),
    ]
    names = (*OUTPUTS, *(f"{name}_b" for name in OUTPUTS))
    model = model_of(nodes, doubled, names)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if "past_k" in value.name or "past_v" in value.name or "present" in value.name:
            value.shape = ir.Shape(["batch", SMALL.kv_heads, "capacity", SMALL.head_dim])
    body = run_body(model.clone(), doubled)
    assert NativeAttentionPass(SMALL.capacity)(model).modified
    assert [node.op_type for node in model.graph].count("LessOrEqual") == 1
    found = session(model).run(None, doubled)
    for ours, theirs in zip(found, body, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=1e-5)


def test_sixteen_bit_graphs_rotate_in_float32() -> None:
    inputs = SMALL.inputs()
    half = {k: v.astype(np.float16) for k, v in inputs.items() if k not in ("cos", "sin")}
    half |= {k: inputs[k] for k in ("cos", "sin", "past_lengths")}
    model = lowered(SMALL, half, ir.DataType.FLOAT16)
    turns = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert len(turns) == 2
    for node in turns:
        widened = node.inputs[0].producer()
        assert widened is not None
        assert widened.op_type == "Cast"
        assert widened.attributes["to"].as_int() == ir.DataType.FLOAT
        (back,) = (use.node for use in node.outputs[0].uses())
        assert back.op_type == "Cast"
        assert back.attributes["to"].as_int() == ir.DataType.FLOAT16
    found = run(model, half)
    assert {array.dtype for array in found} == {np.dtype(np.float16)}
    wide = {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in half.items()}
    for ours, theirs in zip(found, reference(SMALL, wide), strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=1e-2, rtol=1e-2)


def test_a_graph_without_the_ops_is_left_alone() -> None:
    model = lowered(SMALL, SMALL.inputs())
    before = ir.to_proto(model).SerializeToString()
    assert not NativeAttentionPass(capacity=7)(model).modified
    assert ir.to_proto(model).SerializeToString() == before
