"""Lower the cached attention ops to standard ones: RotaryEmbedding, TensorScatter and Attention.

The mask says which keys a query may see. The length inputs of `Attention` would do too, but
compilers drop them or read them wrongly (`passes/lint.py`), so they are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmforge_builder.passes.attention_nodes import Attention, attention_nodes

OPSET = 24  # the first with TensorScatter


def native_attention(model: ir.Model, *, capacity: int) -> bool:
    """Replace every cached attention op; returns whether there was one.

    Args:
        model: A graph with neutral ops.
        capacity: Tokens that a sequence's cache holds. It becomes a fixed dimension: the compilers
            refuse a cache whose capacity varies.
    """
    found = attention_nodes(model.graph)
    if not found:
        return False
    model.opset_imports[""] = OPSET
    model.opset_imports.pop(found[0].node.domain, None)
    places = _places(found[0], capacity)
    for attention in found:
        _lower(model.graph, attention, places, capacity)
    return True


@dataclass(frozen=True, slots=True)
class _Places:
    """Positions `[B, S]` of the new tokens, and the mask `[B, 1, S, capacity]`."""

    positions: ir.Value
    mask: ir.Value


def _places(first: Attention, capacity: int) -> _Places:
    tape, graph = Tape(), first.node.graph
    assert graph is not None
    zero, one = _integers(tape, 0), _integers(tape, 1)
    length = tape.op("Shape", [first.query], {"start": 1, "end": 2})
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


def _lower(graph: ir.Graph, attention: Attention, places: _Places, capacity: int) -> None:
    tape = Tape()
    d = attention.head_dim
    query, key = (
        _heads(tape, value, heads, d, attention, places.positions)
        for value, heads in (
            (attention.query, attention.heads),
            (attention.key, attention.kv_heads),
        )
    )
    value = _heads(tape, attention.value, attention.kv_heads, d, attention, None)
    caches = []
    for past, new in ((attention.past_key, key), (attention.past_value, value)):
        assert past.shape is not None
        past.shape = ir.Shape([past.shape[0], attention.kv_heads, capacity, d])
        inputs = [past, new, attention.past_lengths]
        caches.append(tape.op("TensorScatter", inputs, {"axis": -2, "mode": "linear"}))
    mixed = tape.op("Attention", [query, *caches, places.mask], {"scale": attention.scale})
    rows = tape.op("Transpose", [mixed], {"perm": [0, 2, 1, 3]})
    flat = tape.op("Reshape", [rows, _integers(tape, [0, 0, attention.heads * d])])
    node = attention.node
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], tape.nodes, node.outputs, (flat, *caches)
    )
    for cache in caches:
        assert cache.shape is not None
        cache.shape = ir.Shape([cache.shape[0], attention.kv_heads, capacity, d])


def _heads(
    tape: Tape,
    value: ir.Value,
    heads: int,
    head_dim: int,
    attention: Attention,
    positions: ir.Value | None,
) -> ir.Value:
    """`[B, S, heads * D]` to `[B, heads, S, D]`, rotated if it has `positions`."""
    split = tape.op("Reshape", [value, _integers(tape, [0, 0, heads, head_dim])])
    turned = tape.op("Transpose", [split], {"perm": [0, 2, 1, 3]})
    if positions is None or attention.cos is None or attention.sin is None:
        return turned
    tables = attention.cos, attention.sin
    if value.dtype == attention.cos.dtype:
        return tape.op("RotaryEmbedding", [turned, *tables, positions])
    # Angles are float32 in the original implementations, and so is the product with them.
    wide = tape.op("Cast", [turned], {"to": attention.cos.dtype})
    rotated = tape.op("RotaryEmbedding", [wide, *tables, positions])
    return tape.op("Cast", [rotated], {"to": value.dtype})
