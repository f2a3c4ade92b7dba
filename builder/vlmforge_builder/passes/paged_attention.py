"""Lower cached attention to the op of the attention plugin, over pools of pages.

What a node says beyond the neutral op is its pages: which ones a sequence has, and how many of a
row's tokens are there. It takes query, key and value as one product makes them and gives rows as
the next one takes them, since splitting and reshaping would copy. The first also carries the
compiled kernels into the plan, for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.tape import Tape
from typing_extensions import override

from vlmforge.engine.interface import BLOCK_TABLE, INPUT_IDS, PAGES, QUERY_LENGTHS
from vlmforge_builder.onnx_file import add_input
from vlmforge_builder.ops.cached_attention import CachedAttentionNode
from vlmforge_builder.ops.paged_attention import PagedAttentionNode

_SCALE = 1.0  # what one unit of an fp8 cache is worth: E4M3 reaches to 448


@dataclass(frozen=True)
class PagedAttentionPass(ir.passes.InPlacePass):
    """Replace every cached attention.

    The caches become pools `[pages, kv_heads, page_size, D]` and keep the names of their inputs and
    outputs; they are of the type `stored`, if it is given. The inputs `query_lengths` and
    `block_table` are added.
    """

    page_size: int
    stored: ir.DataType | None = None

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, found = model.graph, CachedAttentionNode.all_in(model.graph)
        if found:
            shape = _rows_shape(graph, found[0])
            pages = _pages(graph, found[0])
        for index, attention in enumerate(found):
            for cache in (cache for pair in attention.caches for cache in pair):
                cache.shape = _pool(attention, self.page_size)
            lowered = _lower(graph, attention, pages, holds_kernels=index == 0)
            _restore_rows(graph, lowered.out, shape)
            if self.stored is not None:
                _store(lowered, self.stored)
        return ir.passes.PassResult(model, modified=bool(found))


class _Pages(NamedTuple):
    """What says where tokens are, int32."""

    past_lengths: ir.Value
    query_lengths: ir.Value
    block_table: ir.Value


def _pages(graph: ir.Graph, first: CachedAttentionNode) -> _Pages:
    lengths, table = (add_input(graph, spec) for spec in (QUERY_LENGTHS, BLOCK_TABLE))
    cast = ir.node("Cast", [first.past_lengths], attributes={"to": ir.DataType.INT32})
    past, past.name = cast.outputs[0], "past_lengths_int32"
    graph.insert_before(first.node, cast)
    return _Pages(past, lengths, table)


def _pool(attention: CachedAttentionNode, page_size: int) -> ir.Shape:
    return ir.Shape([PAGES, attention.kv_num_heads, page_size, attention.head_dim])


def _lower(
    graph: ir.Graph, attention: CachedAttentionNode, pages: _Pages, *, holds_kernels: bool
) -> PagedAttentionNode:
    node = attention.node
    lowered = PagedAttentionNode(
        qkv=attention.packed or _concatenated(graph, attention),
        key_pool=attention.past_key,
        value_pool=attention.past_value,
        past_lengths=pages.past_lengths,
        query_lengths=pages.query_lengths,
        block_table=pages.block_table,
        cos=attention.cos,
        sin=attention.sin,
        num_heads=attention.num_heads,
        kv_num_heads=attention.kv_num_heads,
        scale=attention.scale,
        key_scale=_SCALE,
        value_scale=_SCALE,
        holds_kernels=int(holds_kernels),
        out=ir.Value(),
        key_pool_out=ir.Value(),
        value_pool_out=ir.Value(),
    )
    made = lowered.write(node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made], node.outputs, made.outputs)
    return lowered


def _rows_shape(graph: ir.Graph, first: CachedAttentionNode) -> ir.Value:
    """`[B, S, -1]` of a step."""
    # Not the shape of what is calculated: of a chain, each piece would have to be given it.
    ids = next((value for value in graph.inputs if value.name == INPUT_IDS.name), None)
    tape = Tape()
    rows = tape.op("Shape", [ids or first.packed or first.query], {"start": 0, "end": 2})
    shape = tape.op("Concat", [rows, tape.op("Constant", [], {"value_ints": [-1]})], {"axis": 0})
    graph.insert_before(first.node, tape.nodes)
    return shape


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


def _concatenated(graph: ir.Graph, attention: CachedAttentionNode) -> ir.Value:
    """Query, key and value as the plugin takes them: one after the other in each row."""
    node, parts = attention.node, [attention.query, attention.key, attention.value]
    concat = ir.node("Concat", parts, attributes={"axis": -1}, name=f"{node.name}_qkv")
    made = concat.outputs[0]
    made.name, made.type = concat.name, attention.query.type
    graph.insert_before(node, concat)
    return made


def _store(attention: PagedAttentionNode, stored: ir.DataType) -> None:
    """Give the pools their type."""
    for pool in (pool for pair in attention.pools for pool in pair):
        pool.type = ir.TensorType(stored)
