"""Types of a 16-bit graph: each value's is the one that ONNX infers, and casts are few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from conftest import HF
from lowered_decoder import model_spec, part_of
from vlmforge_builder import build
from vlmforge_builder.export import OPSET
from vlmforge_builder.ops import DOMAIN, VERSION
from vlmforge_builder.passes.assign_precision import TYPES, AssignPrecisionPass
from vlmforge_builder.passes.native_attention import NativeAttentionPass
from vlmforge_builder.weights import stored_dtype

SIXTEEN = ("float16", "bfloat16")
F32 = ir.DataType.FLOAT


def declared(name: str, shape: Sequence[int | str], kind: int = 1) -> onnx.ValueInfoProto:
    return make_tensor_value_info(name, kind, shape)


def typed(model: ir.Model) -> ir.Model:
    """With a type and a shape for every value, as a trace has."""
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True)
    return ir.from_proto(proto)


def small_model() -> ir.Model:
    """A product, a float32 table that meets it twice, a constant, and a second product."""
    nodes = [
        make_node("MatMul", ["x", "weight"], ["product"], name="first"),
        make_node("Mul", ["product", "table"], ["turned"], name="turn"),
        make_node("Add", ["product", "table"], ["moved"], name="move"),
        make_node("Mul", ["product", "half"], ["halved"], name="halve"),
        make_node("Add", ["turned", "moved"], ["sum"], name="sum_up"),
        make_node("Shape", ["sum"], ["dims"], name="measure"),
        make_node("MatMul", ["sum", "weight"], ["hidden"], name="second"),
        make_node("MatMul", ["sum", "weight"], ["again"], name="third"),
        make_node("Add", ["hidden", "halved"], ["mixed"], name="mix"),
        make_node("Add", ["mixed", "again"], ["logits"], name="end"),
    ]
    graph = make_graph(
        nodes,
        "main",
        [declared("x", ["n", 4])],
        [declared(n, ["n", 4]) for n in ("logits", "mixed")] + [declared("dims", [2], 7)],
        [
            numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight"),
            numpy_helper.from_array(np.linspace(0, 1, 4, dtype=np.float32), "table"),
            numpy_helper.from_array(np.array(0.1, np.float32), "half"),
        ],
    )
    model = make_model(graph, opset_imports=[make_opsetid("", OPSET)], ir_version=10)
    return typed(ir.from_proto(model))


def assigned(model: ir.Model, dtype: str) -> ir.Model:
    stored = {"weight": dtype, "table": "float32"}
    result = AssignPrecisionPass(dtype, stored, float32=("x", "logits"))(model)
    assert result.modified is (dtype != "float32")
    return model


def without_values(model: ir.Model, parameters: Sequence[str]) -> onnx.ModelProto:
    """Weights as inputs of their types: their values are not asked for."""
    for name in parameters:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    return ir.to_proto(model)


def check_types(proto: onnx.ModelProto) -> int:
    """Every declared type is the inferred one; returns how many were compared."""
    onnx.checker.check_model(proto)
    said = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(
        proto, check_type=True, strict_mode=True, data_prop=False
    )
    found = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    shared = said.keys() & found.keys()
    assert {n: said[n] for n in shared} == {n: found[n] for n in shared}
    return len(shared)


def casts(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Cast"]


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_value_has_the_type_that_is_inferred(dtype: str) -> None:
    model = assigned(small_model(), dtype)
    assert check_types(without_values(model, ("weight", "table"))) >= 8


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_inputs_outputs_and_tables_have_the_types_asked_for(dtype: str) -> None:
    graph = assigned(small_model(), dtype).graph
    assert [v.name for v in graph.inputs] == ["x"]
    assert graph.inputs[0].dtype == F32
    types = {value.name: value.dtype for value in graph.outputs}
    assert types == {"logits": F32, "mixed": TYPES[dtype], "dims": ir.DataType.INT64}
    assert graph.initializers["table"].dtype == F32
    assert graph.initializers["weight"].dtype == TYPES[dtype]


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_products_run_in_the_dtype_and_what_meets_a_table_in_float32(dtype: str) -> None:
    types = {n.name: n.outputs[0].dtype for n in assigned(small_model(), dtype).graph}
    assert {types[name] for name in ("first", "second", "third", "halve", "mix")} == {TYPES[dtype]}
    assert {types[name] for name in ("turn", "move", "sum_up")} == {F32}


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_value_is_cast_once_for_each_type(dtype: str) -> None:
    made = casts(assigned(small_model(), dtype))
    pairs = Counter((n.inputs[0].name, n.attributes["to"].as_int()) for n in made)
    wanted = TYPES[dtype]
    # `product` meets the table twice and `sum` goes to two products: one cast each.
    assert pairs[("product", F32)] == 1
    assert pairs[("sum", wanted)] == 1
    assert pairs[("x", wanted)] == 1
    assert set(pairs.values()) == {1}
    assert len(pairs) == 4  # and that of the output


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_constants_are_converted_and_not_cast(dtype: str) -> None:
    model = assigned(small_model(), dtype)
    assert "half" not in {node.inputs[0].name for node in casts(model)}
    (halve,) = (node for node in model.graph if node.name == "halve")
    constant = halve.inputs[1]
    assert constant is not None
    assert constant.dtype == TYPES[dtype]
    assert constant.const_value is not None
    value = float(constant.const_value.numpy().astype(np.float32))
    assert value == pytest.approx(0.1, rel=2**-8)


def test_float32_is_left_alone() -> None:
    model = small_model()
    before = ir.to_proto(model).SerializeToString()
    assert ir.to_proto(assigned(model, "float32")).SerializeToString() == before


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_tables_of_a_neutral_op_keep_their_type(dtype: str) -> None:
    names = ["query", "key", "value", "past_key", "past_value"]
    names += ["past_lengths", "cos", "sin"]
    shapes: dict[str, list[int | str]] = {n: ["b", "s", 32] for n in names[:3]}
    shapes |= {n: ["b", 2, "c", 16] for n in names[3:5]} | {n: [9, 8] for n in names[6:]}
    outputs = {"out": shapes["query"], "present_key": shapes["past_key"]}
    outputs["present_value"] = shapes["past_value"]
    attributes = {"num_heads": 2, "kv_num_heads": 2, "scale": 0.25}
    node = make_node("CachedAttention", names, list(outputs), domain=DOMAIN, **attributes)
    tables = [numpy_helper.from_array(np.ones((9, 8), np.float32), n) for n in names[6:]]
    graph = make_graph(
        [node],
        "main",
        [declared(n, shapes[n]) for n in names[:5]] + [declared("past_lengths", ["b"], 7)],
        [declared(n, shape) for n, shape in outputs.items()],
        tables,
    )
    opsets = [make_opsetid("", OPSET), make_opsetid(DOMAIN, VERSION)]
    model = ir.from_proto(make_model(graph, opset_imports=opsets, ir_version=10))
    stored = {"cos": "float32", "sin": "float32"}
    assert AssignPrecisionPass(dtype, stored, float32=())(model).modified
    (made,) = model.graph
    assert [v.dtype for v in made.inputs if v is not None][6:] == [F32, F32]
    assert {v.dtype for v in (*model.graph.inputs[:5], *made.outputs)} == {TYPES[dtype]}
    assert NativeAttentionPass(capacity=12)(model).modified
    check_types(without_values(model, ("cos", "sin")))


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_the_types_of_a_traced_part_are_those_inferred(name: str, dtype: str) -> None:
    part = part_of(model_spec(HF.name), name)
    traced = build.trace(part)  # kept by `traces.py`
    stored = {n: stored_dtype(part.weights[n], dtype) for n in traced.shapes}
    AssignPrecisionPass(dtype, stored, float32=("pixel_values", "logits"))(traced.model)
    assert NativeAttentionPass(capacity=64)(traced.model).modified is (name == "decoder")
    types = {v.name: v.dtype for v in (*traced.model.graph.inputs, *traced.model.graph.outputs)}
    if name == "vision":
        assert types["pixel_values"] == F32
    else:
        assert types["logits"] == F32
        assert types["past_key.0"] == types["present_key.0"] == TYPES[dtype]
    assert check_types(without_values(traced.model, tuple(traced.shapes))) > 30
