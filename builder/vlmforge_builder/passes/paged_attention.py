"""Lower the cached attention ops to those of the attention plugin, over pools of pages.

The plugin is found by the node's domain and op type. What a node says beyond the neutral op is its
pages: which ones a sequence has, and how many of a row's tokens are there; and it takes query, key
and value as one product makes them and gives rows as the next one takes them, since splitting and
reshaping would copy. The first also carries
the compiled kernels into the plan, for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from vlmforge_builder.ops import DOMAIN
from vlmforge_builder.passes.attention_nodes import Attention, attention_nodes, packed

_SCALE = 1.0  # what one unit of an fp8 cache is worth: E4M3 reaches to 448
QUERY_LENGTHS, BLOCK_TABLE = "query_lengths", "block_table"


def paged_attention(model: ir.Model, *, page_size: int, stored: ir.DataType | None = None) -> bool:
    """Replace every cached attention op; returns whether there was one.

    The caches become pools `[pages, kv_heads, page_size, D]` and keep the names of their inputs and
    outputs; they are of the type `stored`, if it is given. Two int32 inputs are added:
    `query_lengths` `[batch]` and `block_table` `[batch, sequence_pages]`.
    """
    graph, found = model.graph, attention_nodes(model.graph)
    if not found:
        return False
    shape = _rows_shape(graph, found[0])
    batch = found[0].past_lengths.shape
    assert batch is not None
    lengths = _input(graph, QUERY_LENGTHS, [batch[0]])
    table = _input(graph, BLOCK_TABLE, [batch[0], "sequence_pages"])
    cast = ir.node("Cast", [found[0].past_lengths], attributes={"to": ir.DataType.INT32})
    past, past.name = cast.outputs[0], "past_lengths_int32"
    graph.insert_before(found[0].node, cast)
    for index, attention in enumerate(found):
        first = index == 0
        out = _lower(graph, attention, (past, lengths, table), page_size, holds_kernels=first)
        _restore_rows(graph, out, shape)
        if stored is not None:
            _store(attention, out, stored)
    return True


def _input(graph: ir.Graph, name: str, shape: Sequence[int | str | ir.SymbolicDim]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def _lower(
    graph: ir.Graph,
    attention: Attention,
    places: tuple[ir.Value, ...],
    page_size: int,
    *,
    holds_kernels: bool,
) -> ir.Value:
    node = attention.node
    pool: list[int | str] = ["pages", attention.kv_heads, page_size, attention.head_dim]
    for cache in (attention.past_key, attention.past_value, *node.outputs[1:]):
        cache.shape = ir.Shape(pool)
    tables = () if attention.cos is None else (attention.cos, attention.sin)
    qkv = packed(node) or _concatenated(graph, node)
    lowered = ir.node(
        "PagedAttention" if tables else "PlainPagedAttention",
        [qkv, attention.past_key, attention.past_value, *places, *tables],
        domain=DOMAIN,
        attributes={
            "num_heads": attention.heads,
            "kv_num_heads": attention.kv_heads,
            "scale": attention.scale,
            "key_scale": _SCALE,
            "value_scale": _SCALE,
            "holds_kernels": int(holds_kernels),
        },
        num_outputs=3,
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [lowered], node.outputs, lowered.outputs
    )
    return lowered.outputs[0]


def _rows_shape(graph: ir.Graph, first: Attention) -> ir.Value:
    """`[B, S, -1]` of a step."""
    rows = ir.node("Shape", [packed(first.node) or first.query], attributes={"start": 0, "end": 2})
    last = ir.node("Constant", [], attributes={"value_ints": [-1]})
    made = ir.node("Concat", [rows.outputs[0], last.outputs[0]], attributes={"axis": 0})
    for node, name in ((rows, "rows"), (last, "rows_last"), (made, "rows_shape")):
        node.name = node.outputs[0].name = name
    graph.insert_before(first.node, [rows, last, made])
    return made.outputs[0]


def _restore_rows(graph: ir.Graph, out: ir.Value, shape: ir.Value) -> None:
    """Give the op's flat rows their sequences back, after the product that takes them.

    Before it, the compiler would copy them.
    """
    products = [node for node, index in out.uses() if (node.op_type, index) == ("MatMul", 0)]
    sinks = len(products) == len(out.uses()) == 1 and not out.is_graph_output()
    flat = products[0].outputs[0] if sinks else out
    producer, name = flat.producer(), flat.name
    assert producer is not None
    whole = ir.node("Reshape", [flat, shape], name=f"{name}_rows")
    made = whole.outputs[0]
    made.type, made.shape = flat.type, flat.shape
    flat.replace_all_uses_with(made, replace_graph_outputs=True)
    whole.replace_input_with(0, flat)
    flat.name, made.name = f"{name}_flat", name
    flat.shape = out.shape = None
    graph.insert_after(producer, whole)


def _concatenated(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """Query, key and value as the plugin takes them: one after the other in each row."""
    concat = ir.node("Concat", node.inputs[:3], attributes={"axis": -1}, name=f"{node.name}_qkv")
    made = concat.outputs[0]
    made.name, made.type = concat.name, node.inputs[0].type if node.inputs[0] is not None else None
    graph.insert_before(node, concat)
    return made


def _store(attention: Attention, out: ir.Value, stored: ir.DataType) -> None:
    """Give the pools their type."""
    node = out.producer()
    assert node is not None
    for pool in (attention.past_key, attention.past_value, *node.outputs[1:]):
        pool.type = ir.TensorType(stored)
