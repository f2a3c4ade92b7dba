"""Lower cached attention to ONNX Runtime's `com.microsoft::GroupQueryAttention`."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape
from typing_extensions import override

from vlmforge.engine.interface import INPUT_IDS
from vlmforge.errors import BuildError
from vlmforge_builder.ops.cached_attention import CachedAttentionNode

TARGET_DOMAIN = "com.microsoft"
_HEAD_STEP = 16  # GroupQueryAttention checks it when it runs


class LowerCachedAttentionPass(ir.passes.InPlacePass):
    """Replace every cached attention.

    GroupQueryAttention wants `seqlens_k = total length - 1` per sequence and the largest total
    length; both follow from `past_lengths` and are computed once for all layers. Projections that
    come from one `Split` are passed packed, which saves the copies.

    Raises:
        BuildError: heads of a size that it cannot rotate.
    """

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = CachedAttentionNode.all_in(model.graph)
        for attention in found:
            _check_heads(attention)
        if found:
            model.opset_imports[TARGET_DOMAIN] = 1
            lengths = _lengths(model.graph, found[0])
        for attention in found:
            _lower(model.graph, attention, *lengths)
        return ir.passes.PassResult(model, modified=bool(found))


def _check_heads(attention: CachedAttentionNode) -> None:
    if attention.rotary and attention.head_dim % _HEAD_STEP:
        raise BuildError(
            "ONNX Runtime's attention cannot rotate heads of this size.",
            found=f"head size {attention.head_dim}",
            expected=f"a multiple of {_HEAD_STEP}",
            fix="build for a GPU: --target tensorrt_rtx --attention native",
        )


def _lengths(graph: ir.Graph, first: CachedAttentionNode) -> tuple[ir.Value, ir.Value]:
    """`seqlens_k` int32 `[B]` and `total_sequence_length` int32 scalar."""
    tape, int32 = Tape(), {"to": ir.DataType.INT32}
    # Not the shape of what is calculated: of a chain, each piece would have to be given it.
    ids = next((value for value in graph.inputs if value.name == INPUT_IDS.name), None)
    tokens = tape.op("Shape", [ids or first.packed or first.query], {"start": 1, "end": 2})
    totals = tape.op("Add", [first.past_lengths, tokens])
    one = tape.op("Constant", [], {"value_ints": [1]})
    last = tape.op("Cast", [tape.op("Sub", [totals, one])], int32)
    largest = tape.op("Cast", [tape.op("ReduceMax", [totals], {"keepdims": 0})], int32)
    for index, node in enumerate(tape.nodes):  # a graph would count on from what it made before
        node.name = node.outputs[0].name = f"lengths_{index}"
    graph.insert_before(first.node, tape.nodes)
    return last, largest


def _lower(
    graph: ir.Graph, attention: CachedAttentionNode, last: ir.Value, largest: ir.Value
) -> None:
    node, whole = attention.node, attention.packed
    separate = [attention.query, attention.key, attention.value]
    lowered = ir.node(
        "GroupQueryAttention",
        [
            *(separate if whole is None else [whole, None, None]),
            *(attention.past_key, attention.past_value),
            *(last, largest),
            *(attention.rotary or ()),
        ],
        domain=TARGET_DOMAIN,
        attributes={
            "num_heads": attention.num_heads,
            "kv_num_heads": attention.kv_num_heads,
            "scale": attention.scale,
            "do_rotary": int(attention.rotary is not None),
        },
        num_outputs=3,
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [lowered], node.outputs, lowered.outputs
    )
