"""Drawn calls of the dense cached attention ops, their reference, and their function bodies run."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from vlmforge.ort import ort
from vlmforge_builder.export import OPSET
from vlmforge_builder.ops import DOMAIN, VERSION, functions

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
        [*inputs[:3], f"past_key{suffix}", f"past_value{suffix}", "past_lengths", *rotary],
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
        shape: list[int | None] = [None] * value.ndim
        if value.ndim == 4:  # a cache, whose last dimension is always said
            shape[-1] = value.shape[-1]
        return make_tensor_value_info(name, kind, shape)

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


OUTPUTS = ("out", "present_key", "present_value")
heads = {
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 3),
    "head_dim": st.sampled_from([16, 32, 64]),
    "slack": st.integers(0, 5),
    "seed": st.integers(0, 2**32 - 1),
    "plain": st.booleans(),
}
ragged = st.builds(
    Shape,
    past=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    tokens=st.integers(1, 5),
    **heads,
)


def close(found: Sequence[Array], expected: Sequence[Array]) -> None:
    for name, ours, theirs in zip(OUTPUTS, found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5, err_msg=name)
