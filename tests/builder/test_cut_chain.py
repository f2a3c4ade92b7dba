"""Cutting a graph into a chain leaves its meaning as it is, and what goes between is what must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from golden_models import FOLDERS
from lowered_decoder import model_spec, part_of
from vlmforge.engine.chain import AttentionCall, GatedActivation
from vlmforge_builder import build
from vlmforge_builder.ops import DOMAIN
from vlmforge_builder.passes.cut_chain import Cut, cut_chain

Array = NDArray[Any]
WIDTH = 4
RANKS = 3  # all of them alike
FLOATS = ("batch", "tokens", WIDTH)


class Drawn:
    """A graph of sums and products with attentions in it, as Hypothesis chooses."""

    def __init__(self, data: st.DataObject) -> None:
        self._data, self.nodes = data, list[ir.Node]()
        self.x = self._value("x", FLOATS)
        self.lengths = self._value("past_lengths", ("batch",), ir.DataType.INT64)
        weight = self._value("w", (WIDTH,))
        weight.const_value = ir.tensor(np.arange(1.0, WIDTH + 1, dtype=np.float32) / 2, name="w")
        self.weight, self.caches = weight, list[ir.Value]()
        self.values, self.presents = [self.x], list[ir.Value]()

    def _value(self, name: str, shape: Any, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def _one(self) -> ir.Value:
        return self._data.draw(st.sampled_from(self.values))

    def _add(self, node: ir.Node, shapes: list[Any]) -> None:
        for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            value.name = f"v{len(self.nodes)}_{index}"
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        node.name = f"n{len(self.nodes)}"
        self.nodes.append(node)
        self.values.append(node.outputs[0])

    def some(self) -> None:
        for _ in range(self._data.draw(st.integers(0, 4))):
            kind = self._data.draw(st.sampled_from(["Add", "Mul", "weight"]))
            if kind == "weight":  # what only weights decide is calculated in each piece
                doubled = ir.node("Add", [self.weight, self.weight])
                self._add(doubled, [(WIDTH,)])
                self.values.pop()
                self._add(ir.node("Mul", [self._one(), doubled.outputs[0]]), [FLOATS])
            else:
                self._add(ir.node(kind, [self._one(), self._one()]), [FLOATS])

    def attention(self) -> None:
        shape = ("batch", 1, "capacity", WIDTH)
        number = len(self.caches)
        caches = [self._value(f"past_{kind}.{number}", shape) for kind in ("key", "value")]
        self.caches += caches
        inputs = [self._one(), self._one(), self._one(), *caches, self.lengths]
        attributes = {"num_heads": 1, "kv_num_heads": 1, "scale": 0.5}
        node = ir.node("PlainCachedAttention", inputs, attributes, domain=DOMAIN, num_outputs=3)
        self._add(node, [FLOATS, shape, shape])
        self.presents += node.outputs[1:]

    def sum_over_ranks(self) -> None:
        self._add(ir.node("AllReduce", [self._one()], domain=DOMAIN), [FLOATS])

    def gate(self) -> None:
        """Of two values side by side."""
        joined = ir.node("Concat", [self._one(), self._one()], {"axis": -1})
        self._add(joined, [("batch", "tokens", 2 * WIDTH)])
        packed = self.values.pop()
        self._add(ir.node("GatedSilu", [packed], domain=DOMAIN), [FLOATS])

    def model(self) -> ir.Model:
        last = ir.node("Add", [self.values[-1], self._one()])
        self._add(last, [FLOATS])
        graph = ir.Graph(
            [self.x, self.lengths, *self.caches],
            [last.outputs[0], *self.presents],
            nodes=self.nodes,
            initializers=[self.weight],
            opset_imports={"": 23, DOMAIN: 1},
        )
        return ir.Model(graph, ir_version=10)


def attend(qkv: Array) -> Array:
    """Anything that depends on all three and on which is which."""
    query, key, value = np.split(qkv, 3, axis=-1)
    return query - 2 * key + np.tanh(value)


def gated(packed: Array) -> Array:
    """Anything that depends on both halves and on which is which."""
    gate, up = np.split(packed, 2, axis=-1)
    return np.tanh(gate) - up


def evaluated(graph: ir.Graph, known: dict[str, Array]) -> dict[str, Array]:
    known = dict(known)
    for value in graph.initializers.values():
        assert value.const_value is not None
        known[value.name or ""] = value.const_value.numpy()
    for node in graph:
        given = [known[value.name or ""] for value in node.inputs if value is not None]
        if node.op_type == "Concat":
            result = np.concatenate(given, axis=-1)
        elif node.op_type == "AllReduce":
            result = RANKS * given[0]
        elif node.op_type == "GatedSilu":
            result = gated(given[0])
        elif node.domain == DOMAIN:
            result = attend(np.concatenate(given[:3], axis=-1))
        else:
            result = {"Add": np.add, "Mul": np.multiply}[node.op_type](*given)
        known[node.outputs[0].name or ""] = result
    return known


def chained(cut: Cut, known: dict[str, Array]) -> dict[str, Array]:
    for index, piece in enumerate(cut.pieces):
        inputs = {value.name or "": known[value.name or ""] for value in piece.graph.inputs}
        results = evaluated(piece.graph, inputs)
        known = {**known, **{v.name or "": results[v.name or ""] for v in piece.graph.outputs}}
        if index < len(cut.between):
            step = cut.between[index]
            if isinstance(step, AttentionCall):
                known[step.out] = attend(known[step.qkv])
            elif isinstance(step, GatedActivation):
                assert step.activation == "silu"
                known[step.out] = gated(known[step.tensor])
            else:
                assert (step.kind, step.width) == ("all_reduce", None)
                known[step.out] = RANKS * known[step.tensor]
    return known


KINDS = st.sampled_from([Drawn.attention, Drawn.sum_over_ranks, Drawn.gate])


@given(st.data(), st.lists(KINDS, min_size=1, max_size=5))
def test_the_meaning_stays(data: st.DataObject, meetings: list[Callable[[Drawn], None]]) -> None:
    drawn, attentions = Drawn(data), meetings.count(Drawn.attention)
    for meeting in meetings:
        drawn.some()
        meeting(drawn)
    drawn.some()
    model = drawn.model()
    name = model.graph.outputs[0].name or ""
    inputs = {"x": np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)}
    expected = evaluated(
        model.graph,
        {
            **inputs,
            **dict.fromkeys(
                (value.name or "" for value in model.graph.inputs[1:]), np.zeros(1, np.float32)
            ),
        },
    )[name]
    cut = cut_chain(model)
    assert len(cut.pieces) == len(cut.between) + 1 == len(meetings) + 1
    assert [call.layer for call in cut.calls] == list(range(attentions))
    np.testing.assert_array_equal(chained(cut, inputs)[name], expected)


@pytest.mark.parametrize("folder", FOLDERS)
def test_pieces_of_every_decoder(folder: str) -> None:
    spec = model_spec(folder)
    traced = build.trace(part_of(spec, "decoder"))
    inputs = {value.name for value in traced.model.graph.inputs}
    cut = cut_chain(traced.model)
    assert [call.layer for call in cut.calls] == list(range(spec.kv.layers))
    used = {name for piece in cut.pieces for name in piece.graph.initializers}
    assert set(traced.shapes) <= used | set(cut.tables or ())  # no weight is lost
    given: set[str | None] = set(inputs)
    for index, piece in enumerate(cut.pieces):
        assert all(node.domain != DOMAIN for node in piece.graph)
        taken = {value.name for value in piece.graph.inputs}
        assert taken <= given
        assert not any(str(name).startswith(("past_key", "past_value")) for name in taken)
        # What goes from piece to piece is of every token, in floats.
        for value in piece.graph.outputs:
            assert value.dtype == ir.DataType.FLOAT
            assert value.name == "logits" or tuple(map(str, value.shape or ()))[:2] == (
                "batch",
                "tokens",
            )
        given |= {value.name for value in piece.graph.outputs}
        given |= {cut.calls[index].out} if index < len(cut.calls) else set()
