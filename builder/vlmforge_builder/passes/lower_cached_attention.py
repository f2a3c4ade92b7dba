"""Lower the cached attention ops to ONNX Runtime's `com.microsoft::GroupQueryAttention`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmforge.errors import BuildError
from vlmforge_builder.ops import DOMAIN
from vlmforge_builder.passes.attention_nodes import packed

TARGET_DOMAIN = "com.microsoft"
_HEAD_STEP = 16  # GroupQueryAttention checks it when it runs
_OPS = ("CachedAttention", "PlainCachedAttention")


def lower_cached_attention(model: ir.Model) -> bool:
    """Replace every `CachedAttention` and `PlainCachedAttention`; returns whether there was one.

    GroupQueryAttention wants `seqlens_k = total length - 1` per sequence and the largest total
    length; both follow from `past_lengths` and are computed once for all layers. Projections that
    come from one `Split` are passed packed, which saves the copies.

    Raises:
        BuildError: heads of a size that it cannot rotate.
    """
    nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type in _OPS]
    if not nodes:
        return False
    for node in nodes:
        _check_heads(node)
    lengths = _lengths(nodes[0])
    for node in nodes:
        _lower(model.graph, node, *lengths)
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[TARGET_DOMAIN] = 1
    return True


def _check_heads(node: ir.Node) -> None:
    _, _, _, past_key, _, *rotary, _ = node.inputs
    shape = past_key.shape if past_key is not None else None
    size = shape[3] if shape is not None else 0
    if rotary and isinstance(size, int) and size % _HEAD_STEP:
        raise BuildError(
            "ONNX Runtime's attention cannot rotate heads of this size.",
            found=f"head size {size}",
            expected=f"a multiple of {_HEAD_STEP}",
            fix="build for a GPU: --target tensorrt_rtx --attention native",
        )


def _lengths(first: ir.Node) -> tuple[ir.Value, ir.Value]:
    """`seqlens_k` int32 `[B]` and `total_sequence_length` int32 scalar."""
    query, past_lengths = first.inputs[0], first.inputs[-1]
    assert query is not None and past_lengths is not None
    projected = packed(first) or query  # or the Split would stay, for its shape only
    tokens = ir.node("Shape", [projected], attributes={"start": 1, "end": 2})
    one = _constant("one", np.array([1], np.int64))
    totals = ir.node("Add", [past_lengths, tokens.outputs[0]])
    last = ir.node("Sub", [totals.outputs[0], one.outputs[0]])
    last32 = ir.node("Cast", [last.outputs[0]], attributes={"to": ir.DataType.INT32})
    largest = ir.node("ReduceMax", [totals.outputs[0]], attributes={"keepdims": 0})
    largest32 = ir.node("Cast", [largest.outputs[0]], attributes={"to": ir.DataType.INT32})
    created = [tokens, one, totals, last, last32, largest, largest32]
    for index, node in enumerate(created):
        node.name = f"lengths_{index}"
        node.outputs[0].name = f"lengths_{index}"
    graph = first.graph
    assert graph is not None
    graph.insert_before(first, created)
    return last32.outputs[0], largest32.outputs[0]


def _constant(name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> ir.Node:
    return ir.node("Constant", [], attributes={"value": ir.tensor(value, name=name)})


def _lower(graph: ir.Graph, node: ir.Node, last: ir.Value, largest: ir.Value) -> None:
    query, key, value, past_key, past_value, *rotary, _ = node.inputs
    whole = packed(node)
    projections = [whole, None, None] if whole is not None else [query, key, value]
    attention = ir.node(
        "GroupQueryAttention",
        [*projections, past_key, past_value, last, largest, *rotary],
        domain=TARGET_DOMAIN,
        attributes={
            "num_heads": node.attributes["num_heads"].as_int(),
            "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
            "scale": node.attributes["scale"].as_float(),
            "do_rotary": int(bool(rotary)),
        },
        num_outputs=3,
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [attention], node.outputs, attention.outputs
    )
