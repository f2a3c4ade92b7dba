"""Lower cached attention to standard ops: RotaryEmbedding, TensorScatter and Attention.

The mask says which keys a query may see. The length inputs of `Attention` would do too, but
compilers drop them or read them wrongly (`passes/lint.py`), so they are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape
from typing_extensions import override

from vlmforge.engine.interface import INPUT_IDS
from vlmforge_builder.ops.cached_attention import CachedAttentionNode

OPSET = 24  # the first with TensorScatter


@dataclass(frozen=True)
class NativeAttentionPass(ir.passes.InPlacePass):
    """Replace every cached attention.

    `capacity` is how many tokens a sequence's cache holds. It becomes a fixed dimension: the
    compilers refuse a cache whose capacity varies.
    """

    capacity: int

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = CachedAttentionNode.all_in(model.graph)
        if found:
            model.opset_imports[""] = OPSET
            places = _places(model.graph, found[0], self.capacity)
        for attention in found:
            _lower(model.graph, attention, places, self.capacity)
        return ir.passes.PassResult(model, modified=bool(found))


@dataclass(frozen=True, slots=True)
class _Places:
    """Positions `[B, S]` of the new tokens, and the mask `[B, 1, S, capacity]`."""

    positions: ir.Value
    mask: ir.Value


def _places(graph: ir.Graph, first: CachedAttentionNode, capacity: int) -> _Places:
    tape = Tape()
    zero, one = _integers(tape, 0), _integers(tape, 1)
    # Not the shape of what is calculated: of a chain, each piece would have to be given it.
    ids = next((value for value in graph.inputs if value.name == INPUT_IDS.name), None)
    length = tape.op("Shape", [ids or first.query], {"start": 1, "end": 2})
    scalar = tape.op("Squeeze", [length, _integers(tape, [0])])
    steps = tape.op("Range", [zero, scalar, one])
    rows = tape.op("Unsqueeze", [first.past_lengths, _integers(tape, [1])])
    positions = tape.op("Add", [rows, tape.op("Unsqueeze", [steps, _integers(tape, [0])])])
    keys = _integers(tape, np.arange(capacity).reshape(1, 1, 1, capacity))
    queries = tape.op("Unsqueeze", [positions, _integers(tape, [1, 3])])
    mask = tape.op("LessOrEqual", [keys, queries])
    graph.insert_before(first.node, tape.nodes)
    return _Places(positions, mask)


def _integers(tape: Tape, values: object) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})


def _lower(graph: ir.Graph, attention: CachedAttentionNode, places: _Places, capacity: int) -> None:
    tape, d = Tape(), attention.head_dim
    heads, kv_heads = attention.num_heads, attention.kv_num_heads
    query = _turned(tape, _split(tape, attention.query, heads, d), attention, places)
    key = _turned(tape, _split(tape, attention.key, kv_heads, d), attention, places)
    value = _split(tape, attention.value, kv_heads, d)
    caches = []
    for (past, _), new in zip(attention.caches, (key, value), strict=True):
        assert past.shape is not None
        past.shape = ir.Shape([past.shape[0], kv_heads, capacity, d])
        inputs = [past, new, attention.past_lengths]
        caches.append(tape.op("TensorScatter", inputs, {"axis": -2, "mode": "linear"}))
    mixed = tape.op("Attention", [query, *caches, places.mask], {"scale": attention.scale})
    rows = tape.op("Transpose", [mixed], {"perm": [0, 2, 1, 3]})
    flat = tape.op("Reshape", [rows, _integers(tape, [0, 0, heads * d])])
    node = attention.node
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], tape.nodes, node.outputs, (flat, *caches)
    )
    for cache in caches:
        assert cache.shape is not None
        cache.shape = ir.Shape([cache.shape[0], kv_heads, capacity, d])


def _split(tape: Tape, value: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """`[B, S, heads * D]` to `[B, heads, S, D]`."""
    split = tape.op("Reshape", [value, _integers(tape, [0, 0, heads, head_dim])])
    return tape.op("Transpose", [split], {"perm": [0, 2, 1, 3]})


def _turned(
    tape: Tape, heads: ir.Value, attention: CachedAttentionNode, places: _Places
) -> ir.Value:
    """Rotated by the positions, if there are tables."""
    if attention.rotary is None:
        return heads
    cos, sin = attention.rotary
    if attention.query.dtype == cos.dtype:
        return tape.op("RotaryEmbedding", [heads, cos, sin, places.positions])
    # Angles are float32 in the original implementations, and so is the product with them.
    wide = tape.op("Cast", [heads], {"to": cos.dtype})
    rotated = tape.op("RotaryEmbedding", [wide, cos, sin, places.positions])
    return tape.op("Cast", [rotated], {"to": attention.query.dtype})
