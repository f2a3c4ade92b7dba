"""Neutral ops of the domain `vlmforge`: what a block emits and a target lowers.

Each op has a meaning in standard ONNX ops (`op_bodies`), which is its documentation and the oracle
that tests compare a lowering with.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

DOMAIN = "vlmforge"
VERSION = 1


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_lengths: Tensor,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding, write K/V into the cache, causal attention over it.

    Args:
        query: `[B, S, num_heads * D]`, not yet rotated.
        key, value: `[B, S, kv_num_heads * D]`.
        past_key, past_value: `[B, kv_num_heads, C, D]`; the first `past_lengths[b]` tokens of a
            sequence are valid, the rest is arbitrary finite data.
        cos, sin: `[P, D / 2]`, row p for position p (rotate-half convention).
        past_lengths: int64 `[B]`. Token s of sequence b sits at position `past_lengths[b] + s`.
        num_heads, kv_num_heads: Heads of queries, and of keys and values (grouped-query attention,
            https://arxiv.org/abs/2305.13245).
        scale: Factor on the attention scores.

    Returns:
        Attention output `[B, S, num_heads * D]` and the two caches with the new tokens written.
    """
    return torch.onnx.ops.symbolic_multi_out(  # type: ignore[return-value]
        f"{DOMAIN}::CachedAttention",
        (query, key, value, past_key, past_value, cos, sin, past_lengths),
        attrs={"num_heads": num_heads, "kv_num_heads": kv_num_heads, "scale": scale},
        dtypes=(query.dtype, past_key.dtype, past_value.dtype),
        shapes=(query.shape, past_key.shape, past_value.shape),
        version=VERSION,
    )


def plain_cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cached_attention`, for query and key that carry their positions already.

    For positions that are no row number of one table: those of a sequence may depend on more than
    its own length, and queries may be scaled by theirs.
    """
    return torch.onnx.ops.symbolic_multi_out(  # type: ignore[return-value]
        f"{DOMAIN}::PlainCachedAttention",
        (query, key, value, past_key, past_value, past_lengths),
        attrs={"num_heads": num_heads, "kv_num_heads": kv_num_heads, "scale": scale},
        dtypes=(query.dtype, past_key.dtype, past_value.dtype),
        shapes=(query.shape, past_key.shape, past_value.shape),
        version=VERSION,
    )


def functions() -> tuple[ir.Function, ...]:
    """The bodies of all neutral ops, to be added to a model that still contains them."""
    from vlmforge_builder.op_bodies import CachedAttention, PlainCachedAttention, Rotate

    bodies = (PlainCachedAttention, Rotate, CachedAttention)
    return tuple(ir.serde.deserialize_function(body.to_function_proto()) for body in bodies)
