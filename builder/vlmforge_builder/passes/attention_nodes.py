"""The cached attention ops of a graph, read once for all passes that lower them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmforge_builder.ops import DOMAIN

_ROTATING, _PLAIN = "CachedAttention", "PlainCachedAttention"


@dataclass(frozen=True, slots=True)
class Attention:
    """One op by its inputs and attributes; `cos` and `sin` are None where it does not rotate."""

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    cos: ir.Value | None
    sin: ir.Value | None
    past_lengths: ir.Value
    heads: int
    kv_heads: int
    head_dim: int
    scale: float


def attention_nodes(graph: ir.Graph) -> tuple[Attention, ...]:
    """All cached attention ops in the order of the graph."""
    return tuple(_read(n) for n in graph if n.domain == DOMAIN and n.op_type in (_ROTATING, _PLAIN))


def _read(node: ir.Node) -> Attention:
    query, key, value, past_key, past_value, *rotary, past_lengths = node.inputs
    required = (query, key, value, past_key, past_value, past_lengths)
    present = [value for value in required if value is not None]
    query, key, value, past_key, past_value, past_lengths = present
    cos, sin = rotary or (None, None)
    assert past_key.shape is not None
    head_dim = past_key.shape[3]
    assert isinstance(head_dim, int)
    return Attention(
        node,
        query,
        key,
        value,
        past_key,
        past_value,
        cos,
        sin,
        past_lengths,
        heads=node.attributes["num_heads"].as_int(),
        kv_heads=node.attributes["kv_num_heads"].as_int(),
        head_dim=head_dim,
        scale=node.attributes["scale"].as_float(),
    )


def packed(node: ir.Node) -> ir.Value | None:
    """The value whose three-way `Split` gives the op's query, key and value, if there is one."""
    projections = node.inputs[:3]
    split = projections[0].producer() if projections[0] is not None else None
    if split is None or split.op_type != "Split" or list(split.outputs) != list(projections):
        return None
    return split.inputs[0]
