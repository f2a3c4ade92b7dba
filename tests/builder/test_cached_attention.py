"""The neutral attention op: its body, its lowering, and the storage of weights in 16 bits."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmforge_builder.export import OPSET
from vlmforge_builder.ops import DOMAIN, VERSION, functions
from vlmforge_builder.passes.lower_cached_attention import lower_cached_attention
from vlmforge_builder.passes.store_weights import store_weights

Array = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]
ROTARY = ("cos", "sin")


@dataclass(frozen=True)
class Shape:
    """A call: `past` is the length of each sequence, `tokens` how many are new in all of them."""

    kv_heads: int
    group: int
    head_dim: int
    past: tuple[int, ...]
    tokens: int
    slack: int
    seed: int
    plain: bool = False  # `PlainCachedAttention`: nothing is turned

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def capacity(self) -> int:
        return max(self.past) + self.tokens + self.slack

    def inputs(self) -> Arrays:
        rng = np.random.default_rng(self.seed)

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, np.float32)

        batch, width = len(self.past), self.kv_heads * self.head_dim
        angles = rng.uniform(0, 2 * np.pi, (self.capacity + 3, self.head_dim // 2))
        cache = (batch, self.kv_heads, self.capacity, self.head_dim)
        given = {
            "query": normal(batch, self.tokens, self.heads * self.head_dim),
            "key": normal(batch, self.tokens, width),
            "value": normal(batch, self.tokens, width),
            "past_key": normal(*cache),  # beyond each length: arbitrary, as a reused slot is
            "past_value": normal(*cache),
            "cos": np.cos(angles).astype(np.float32),
            "sin": np.sin(angles).astype(np.float32),
            "past_lengths": np.array(self.past, np.int64),
        }
        return {k: v for k, v in given.items() if not (self.plain and k in ROTARY)}

    def turn(self, given: Arrays, place: int) -> tuple[Array, Array]:
        """Cosines and sines of a place."""
        if self.plain:
            return np.ones(1, np.float32), np.zeros(1, np.float32)
        return given["cos"][place], given["sin"][place]

    @property
    def scale(self) -> float:
        return 0.7 / math.sqrt(self.head_dim)


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    """One head of one token, by the complex product of its two halves."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * (cos + 1j * sin)
    return np.concatenate((turned.real, turned.imag)).astype(np.float32)


def reference(shape: Shape, given: Arrays) -> tuple[Array, Array, Array]:
    """The op's contract, one head of one token at a time."""
    keys, values = given["past_key"].copy(), given["past_value"].copy()
    out = np.zeros_like(given["query"])
    dim = shape.head_dim
    for row, past in enumerate(shape.past):
        for token in range(shape.tokens):
            place = past + token
            turn = shape.turn(given, place)
            for head in range(shape.kv_heads):
                part = slice(head * dim, (head + 1) * dim)
                keys[row, head, place] = rotated(given["key"][row, token, part], *turn)
                values[row, head, place] = given["value"][row, token, part]
            for head in range(shape.heads):
                part, source = slice(head * dim, (head + 1) * dim), head // shape.group
                query = rotated(given["query"][row, token, part], *turn).astype(np.float64)
                scores = keys[row, source, : place + 1] @ query * shape.scale
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[row, token, part] = weights @ values[row, source, : place + 1]
    return out, keys, values


def attention_node(shape: Shape, inputs: Sequence[str], suffix: str = "") -> onnx.NodeProto:
    rotary = () if shape.plain else ROTARY
    return make_node(
        "PlainCachedAttention" if shape.plain else "CachedAttention",
        [*inputs[:3], f"past_key{suffix}", f"past_value{suffix}", *rotary, "past_lengths"],
        [f"out{suffix}", f"present_key{suffix}", f"present_value{suffix}"],
        name=f"attention{suffix}",
        domain=DOMAIN,
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        scale=shape.scale,
    )


def model_of(nodes: Sequence[onnx.NodeProto], inputs: Arrays, outputs: Sequence[str]) -> ir.Model:
    def declared(name: str, value: NDArray[Any]) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if value.dtype == np.int64 else TensorProto.FLOAT
        return make_tensor_value_info(name, kind, [None] * value.ndim)

    graph = make_graph(
        nodes,
        "main",
        [declared(name, value) for name, value in inputs.items()],
        [make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [make_opsetid("", OPSET), make_opsetid(DOMAIN, VERSION)]
    return ir.from_proto(make_model(graph, opset_imports=opsets, ir_version=10))


@functools.cache
def bodies() -> tuple[ir.Function, ...]:
    return functions()


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run_body(model: ir.Model, inputs: Arrays) -> list[Array]:
    for function in bodies():
        model.functions[function.identifier()] = function
    return list(session(model).run(None, inputs))


def run_lowered(model: ir.Model, inputs: Arrays) -> list[Array]:
    """In the way of the runtime: each present cache is bound to the buffer of its past."""
    assert lower_cached_attention(model)
    RemoveUnusedNodesPass()(model)
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


OUTPUTS = ("out", "present_key", "present_value")
PROJECTIONS = ("query", "key", "value")
heads = {
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 3),
    "head_dim": st.sampled_from([16, 32, 64]),
    "slack": st.integers(0, 5),
    "seed": st.integers(0, 2**32 - 1),
    "plain": st.booleans(),
}
prefills = st.builds(Shape, past=st.tuples(st.integers(0, 20)), tokens=st.integers(1, 9), **heads)
first_prefills = st.builds(Shape, past=st.just((0,)), tokens=st.integers(1, 24), **heads)
decodes = st.builds(
    Shape,
    past=st.lists(st.integers(0, 20), min_size=1, max_size=4).map(tuple),
    tokens=st.just(1),
    **heads,
)
ragged = st.builds(
    Shape,
    past=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    tokens=st.integers(1, 5),
    **heads,
)
thorough = settings(max_examples=40, deadline=None)


def close(found: Sequence[Array], expected: Sequence[Array]) -> None:
    for name, ours, theirs in zip(OUTPUTS, found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5, err_msg=name)


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
@settings(max_examples=20, deadline=None)
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
@settings(max_examples=20, deadline=None)
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


def test_a_graph_without_the_op_is_left_alone() -> None:
    model = model_of([make_node("Neg", ["x"], ["out"])], {"x": np.ones(2, np.float32)}, ["out"])
    assert not lower_cached_attention(model)
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
    assert store_weights(model, plan)
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
    store_weights(model, {"table": "float16", "matrix": "float16"})
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
    assert not store_weights(model, dict.fromkeys(weights(), "float32"))
    assert ir.to_proto(model).SerializeToString() == before
