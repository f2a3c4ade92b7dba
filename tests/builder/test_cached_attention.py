"""The neutral attention op: its body, its lowering, and the storage of weights in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.helper import make_node
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

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
from vlmforge.errors import BuildError
from vlmforge.ort import ort
from vlmforge_builder.ops import DOMAIN
from vlmforge_builder.passes.lower_cached_attention import LowerCachedAttentionPass
from vlmforge_builder.passes.store_weights import StoreWeightsPass


def run_lowered(model: ir.Model, inputs: Arrays) -> list[Array]:
    """In the way of the runtime: each present cache is bound to the buffer of its past."""
    lower = LowerCachedAttentionPass(), RemoveUnusedNodesPass(), RemoveUnusedOpsetsPass()
    assert Sequential(*lower)(model).modified
    assert DOMAIN not in model.opset_imports
    made = session(model)
    binding = made.io_binding()
    values = {k: ort.OrtValue.ortvalue_from_numpy(v.copy()) for k, v in inputs.items()}
    for item in made.get_inputs():
        binding.bind_ortvalue_input(item.name, values[item.name])
    for item in made.get_outputs():
        if item.name.startswith("present"):
            binding.bind_ortvalue_output(item.name, values[item.name.replace("present", "past")])
        else:
            binding.bind_output(item.name)
    made.run_with_iobinding(binding)
    # Copies: what `numpy()` gives points into buffers that end with this function.
    return [value.numpy().copy() for value in binding.get_outputs()]


PROJECTIONS = ("query", "key", "value")
prefills = st.builds(Shape, past=st.tuples(st.integers(0, 20)), tokens=st.integers(1, 9), **heads)
first_prefills = st.builds(Shape, past=st.just((0,)), tokens=st.integers(1, 24), **heads)
decodes = st.builds(
    Shape,
    past=st.lists(st.integers(0, 20), min_size=1, max_size=4).map(tuple),
    tokens=st.just(1),
    **heads,
)
thorough = settings(max_examples=40)


@given(ragged | decodes)
@thorough
def test_the_body_is_what_the_contract_says(shape: Shape) -> None:
    inputs = shape.inputs()
    model = model_of([attention_node(shape, PROJECTIONS)], inputs, OUTPUTS)
    close(run_body(model, inputs), reference(shape, inputs))


@given(prefills | first_prefills | decodes)
@thorough
def test_lowered_is_what_the_body_says(shape: Shape) -> None:
    """Caches too, whole: rows beside the new ones must stay as they are."""
    inputs = shape.inputs()
    nodes = [attention_node(shape, PROJECTIONS)]
    expected = run_body(model_of(nodes, inputs, OUTPUTS), inputs)
    close(run_lowered(model_of(nodes, inputs, OUTPUTS), inputs), expected)


def packed_inputs(inputs: Arrays, order: Sequence[str]) -> Arrays:
    """The three projections side by side in one input."""
    rest = {name: value for name, value in inputs.items() if name not in PROJECTIONS}
    return {"qkv": np.concatenate([inputs[name] for name in order], axis=-1), **rest}


def split_node(inputs: Arrays, order: Sequence[str]) -> list[onnx.NodeProto]:
    widths = [inputs[name].shape[-1] for name in order]
    sizes = make_node("Constant", [], ["sizes"], value_ints=widths)
    return [sizes, make_node("Split", ["qkv", "sizes"], list(order), axis=-1)]


@pytest.mark.parametrize(
    ("order", "packed"),
    [(PROJECTIONS, True), (("key", "query", "value"), False), (("query", "value", "key"), False)],
)
@given(shape=prefills | decodes)
@settings(max_examples=20)
def test_projections_of_one_split(order: tuple[str, ...], packed: bool, shape: Shape) -> None:
    separate = shape.inputs()
    expected = reference(shape, separate)
    inputs = packed_inputs(separate, order)
    nodes = [*split_node(separate, order), attention_node(shape, PROJECTIONS)]
    model = model_of(nodes, inputs, OUTPUTS)
    close(run_lowered(model, inputs), expected)
    kinds = [node.op_type for node in model.graph]
    assert ("Split" not in kinds) == packed  # packed: passed whole, and nobody splits


@given(prefills | decodes)
@settings(max_examples=20)
def test_layers_share_the_lengths(shape: Shape) -> None:
    inputs = shape.inputs()
    second = replace(shape, seed=shape.seed + 1).inputs()
    inputs |= {f"{name}2": second[name] for name in ("past_key", "past_value")}
    nodes = [
        attention_node(shape, PROJECTIONS),
        attention_node(shape, ("out", "key", "value"), "2"),
    ]
    outputs = (*OUTPUTS, *(f"{name}2" for name in OUTPUTS))
    model = model_of(nodes, inputs, outputs)
    found = run_lowered(model, inputs)
    first = reference(shape, inputs)
    close(found[:3], first)
    chained = {**inputs, "query": first[0], "past_key": inputs["past_key2"]}
    chained["past_value"] = inputs["past_value2"]
    close(found[3:], reference(shape, chained))
    assert [node.op_type for node in model.graph].count("ReduceMax") == 1


def test_heads_that_cannot_be_rotated_are_refused() -> None:
    """A width that is no multiple of 16 fails only when the engine runs, in words of its own."""
    shape = Shape(kv_heads=1, group=2, head_dim=24, past=(0,), tokens=2, slack=0, seed=0)
    nodes = [attention_node(shape, ("query", "key", "value"))]
    model = model_of(nodes, shape.inputs(), OUTPUTS)
    for value in model.graph.inputs:
        if value.name == "past_key":
            value.shape = ir.Shape(["batch", 1, "capacity", 24])
    with pytest.raises(BuildError) as caught:
        LowerCachedAttentionPass()(model)
    assert caught.value.found == "head size 24"
    plain = replace(shape, plain=True)
    nodes = [attention_node(plain, ("query", "key", "value"))]
    assert LowerCachedAttentionPass()(model_of(nodes, plain.inputs(), OUTPUTS)).modified


def test_a_graph_without_the_op_is_left_alone() -> None:
    model = model_of([make_node("Neg", ["x"], ["out"])], {"x": np.ones(2, np.float32)}, ["out"])
    assert not LowerCachedAttentionPass()(model).modified
    assert [node.op_type for node in model.graph] == ["Neg"]


# --- store_weights ----------------------------------------------------------------------------

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16}
IR = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {
        "table": torch.randn(11, 16),
        "matrix": torch.randn(16, 7) / 3,
        "bias": torch.randn(7),
        "exact": torch.randn(7),
    }


def table_model() -> ir.Model:
    """Rows of a table by a matrix, beside the table's own transpose (a tied head)."""
    nodes = [
        make_node("Gather", ["table", "ids"], ["rows"], name="gather"),
        make_node("MatMul", ["rows", "matrix"], ["product"], name="matmul"),
        make_node("Add", ["product", "bias"], ["sum"], name="add"),
        make_node("Mul", ["sum", "exact"], ["out"], name="mul"),
        make_node("Transpose", ["table"], ["head"], name="transpose", perm=[1, 0]),
        make_node("MatMul", ["rows", "head"], ["logits"], name="logits"),
    ]
    values = {name: value.numpy() for name, value in weights().items()}
    model = model_of(nodes, {"ids": np.zeros((1, 1), np.int64), **values}, ["out", "logits"])
    named = {value.name: value for value in model.graph.inputs}
    model.graph.inputs[:] = [named["ids"]]
    for name, array in values.items():
        named[name].const_value = ir.tensor(array, name=name)
        named[name].shape = ir.Shape(array.shape)
        model.graph.register_initializer(named[name])
    return model


@pytest.mark.parametrize("dtype", TORCH)
def test_stored_weights_are_the_rounded_ones(dtype: str) -> None:
    model = table_model()
    plan = {"table": dtype, "matrix": dtype, "bias": dtype, "exact": "float32"}
    assert StoreWeightsPass(plan)(model).modified
    for name, wanted in plan.items():
        value = model.graph.initializers[name]
        if wanted != "float32":
            assert value.dtype == IR[dtype]
            bits = weights()[name].to(TORCH[dtype]).view(torch.int16).numpy()
            value.const_value = ir.tensor(bits.view(IR[dtype].numpy()), dtype=IR[dtype], name=name)
    ids = np.array([[3, 0, 10], [7, 7, 1]], np.int64)
    out, logits = session(model).run(None, {"ids": ids})
    w = {k: v if k == "exact" else v.to(TORCH[dtype]).float() for k, v in weights().items()}
    rows = w["table"][torch.from_numpy(ids)]
    expected = (rows @ w["matrix"] + w["bias"]) * w["exact"]
    np.testing.assert_allclose(out, expected.numpy(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits, (rows @ w["table"].T).numpy(), atol=1e-4, rtol=0)
    # Not by accident: unrounded weights give something else.
    plain = (weights()["table"][ids] @ weights()["matrix"] + weights()["bias"]) * w["exact"]
    assert float((expected - plain).abs().max()) > 1e-4


def test_casts_come_after_gathers_and_before_products() -> None:
    model = table_model()
    StoreWeightsPass({"table": "float16", "matrix": "float16"})(model)
    nodes = {node.name: node for node in model.graph}
    table, matrix = (model.graph.initializers[name] for name in ("table", "matrix"))
    assert nodes["gather"].inputs[0] is table  # only the rows in use are cast
    assert nodes["gather"].outputs[0].dtype == ir.DataType.FLOAT16
    left, right = (value.producer() for value in nodes["matmul"].inputs if value is not None)
    assert left is not None and right is not None
    assert (left.op_type, left.inputs[0]) == ("Cast", nodes["gather"].outputs[0])
    assert (right.op_type, right.inputs[0]) == ("Cast", matrix)
    assert model.graph.initializers["bias"].dtype == ir.DataType.FLOAT


def test_float32_changes_nothing() -> None:
    model = table_model()
    before = ir.to_proto(model).SerializeToString()
    assert not StoreWeightsPass(dict.fromkeys(weights(), "float32"))(model).modified
    assert ir.to_proto(model).SerializeToString() == before
