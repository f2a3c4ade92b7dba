"""Cached attention: rotary embedding, write K/V into a dense cache, causal attention over it.

`CachedAttention` turns query and key by tables of angles; `PlainCachedAttention` has no tables: its
query and key carry their positions already, which may be no row numbers of one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript import script
from torch import Tensor
from typing_extensions import override

from vlmforge_builder.ops.node import (
    OPSET,
    Floats,
    In,
    Int64s,
    OpNode,
    Out,
    Table,
    emit,
    misread,
    op,
)


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Emit the op.

    Args:
        query: `[B, S, num_heads * D]`.
        key, value: `[B, S, kv_num_heads * D]`.
        past_key, past_value: `[B, kv_num_heads, C, D]`; the first `past_lengths[b]` tokens of a
            sequence are valid, the rest is arbitrary finite data.
        past_lengths: int64 `[B]`. Token s of sequence b sits at position `past_lengths[b] + s`.
        rotary: Cosines and sines `[P, D / 2]`, row p for position p (rotate-half convention); None:
            nothing is turned.
        num_heads, kv_num_heads: Heads of queries, and of keys and values (grouped-query attention,
            https://arxiv.org/abs/2305.13245).
        scale: Factor on the attention scores.

    Returns:
        Attention output `[B, S, num_heads * D]` and the two caches with the new tokens written.
    """
    out, present_key, present_value = emit(
        "PlainCachedAttention" if rotary is None else "CachedAttention",
        (query, key, value, past_key, past_value, past_lengths, *(rotary or ())),
        {"num_heads": num_heads, "kv_num_heads": kv_num_heads, "scale": scale},
        like=(query, past_key, past_value),
    )
    return out, present_key, present_value


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedAttentionNode(OpNode):
    """A node of either op."""

    op_types: ClassVar[tuple[str, ...]] = ("CachedAttention", "PlainCachedAttention")

    query: In
    key: In
    value: In
    past_key: In
    past_value: In
    past_lengths: In
    cos: Table | None = None
    sin: Table | None = None
    num_heads: int
    kv_num_heads: int
    scale: float
    out: Out
    present_key: Out
    present_value: Out

    @property
    @override
    def op_type(self) -> str:
        return self.op_types[0 if self.rotary else 1]

    @property
    def rotary(self) -> tuple[ir.Value, ir.Value] | None:
        """Cosines and sines; None: nothing is turned."""
        return None if self.cos is None or self.sin is None else (self.cos, self.sin)

    @property
    def caches(self) -> tuple[tuple[ir.Value, ir.Value], ...]:
        """Of keys and of values: before the op, and after it."""
        return (self.past_key, self.present_key), (self.past_value, self.present_value)

    @property
    def head_dim(self) -> int:
        """Width of a head (BuildError: the graph does not say it)."""
        size = None if self.past_key.shape is None else self.past_key.shape[3]
        if isinstance(size, int):
            return size
        raise misread(type(self), self.node, f"a cache of shape {self.past_key.shape}", "a width")

    @property
    def packed(self) -> ir.Value | None:
        """The value whose three-way `Split` gives query, key and value, if there is one."""
        projections = [self.query, self.key, self.value]
        split = self.query.producer()
        if split is None or split.op_type != "Split" or list(split.outputs) != projections:
            return None
        return split.inputs[0]


@script(OPSET, default_opset=op)
def PlainCachedAttention(  # noqa: N802 - an ONNX function carries its op's name
    query: Floats,
    key: Floats,
    value: Floats,
    past_key: Floats,
    past_value: Floats,
    past_lengths: Int64s,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[Floats, Floats, Floats]:
    """What `cached_attention` means without tables."""
    heads = op.Constant(value_ints=[0, 0])
    d = op.Shape(past_key, start=3)
    split = op.Concat(heads, op.Constant(value_ints=[-1]), d, axis=0)
    n_s = op.Shape(query, start=1, end=2)
    capacity = op.Squeeze(op.Shape(past_key, start=2, end=3))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    steps = op.Range(zero, op.Squeeze(n_s), one)
    positions = op.Add(op.Unsqueeze(past_lengths, [1]), op.Unsqueeze(steps, [0]))  # [B, S]
    q = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Reshape(key, split), perm=[0, 2, 1, 3])
    v = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    # Write row s of the new tokens to row positions[b, s] of the cache.
    index = op.Expand(op.Unsqueeze(positions, [1, 3]), op.Shape(k))
    present_key = op.ScatterElements(past_key, index, k, axis=2)
    present_value = op.ScatterElements(past_value, index, v, axis=2)
    # Group the query heads by the key/value head they share.
    kv = op.Shape(past_key, start=1, end=2)
    batch = op.Shape(query, start=0, end=1)
    grouped = op.Concat(batch, kv, op.Constant(value_ints=[-1]), n_s, d, axis=0)
    q5 = op.Reshape(q, grouped)
    scores = op.MatMul(q5, op.Transpose(op.Unsqueeze(present_key, [2]), perm=[0, 1, 2, 4, 3]))
    scores = scores * scale
    columns = op.Range(zero, capacity, one)
    visible = op.LessOrEqual(op.Unsqueeze(columns, [0, 1]), op.Unsqueeze(positions, [2]))
    minus_infinity = op.CastLike(op.Constant(value_float=float("-inf")), scores)
    scores = op.Where(op.Unsqueeze(visible, [1, 2]), scores, minus_infinity)
    out = op.MatMul(op.Softmax(scores, axis=-1), op.Unsqueeze(present_value, [2]))
    flat = op.Concat(batch, op.Constant(value_ints=[-1]), n_s, d, axis=0)
    merged = op.Transpose(op.Reshape(out, flat), perm=[0, 2, 1, 3])
    return op.Reshape(merged, op.Shape(query)), present_key, present_value


@script(OPSET, default_opset=op)
def Rotate(  # noqa: N802
    x: Floats, cos: Floats, sin: Floats, past_lengths: Int64s
) -> Floats:
    """Rotary embedding of `[B, S, heads * D]` by position, in the tables' precision."""
    half = op.Shape(cos, start=1)
    split = op.Concat(
        op.Constant(value_ints=[0, 0, -1]), op.Mul(half, op.Constant(value_int=2)), axis=0
    )
    length = op.Squeeze(op.Shape(x, start=1, end=2))
    steps = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    positions = op.Add(op.Unsqueeze(past_lengths, [1]), op.Unsqueeze(steps, [0]))  # [B, S]
    c = op.Unsqueeze(op.Gather(cos, positions), [2])
    s = op.Unsqueeze(op.Gather(sin, positions), [2])
    first, second = op.Split(op.CastLike(op.Reshape(x, split), cos), num_outputs=2, axis=-1)
    turned = op.Concat(first * c - second * s, second * c + first * s, axis=-1)
    return op.CastLike(op.Reshape(turned, op.Shape(x)), x)


@script(OPSET, default_opset=op)
def CachedAttention(  # noqa: N802
    query: Floats,
    key: Floats,
    value: Floats,
    past_key: Floats,
    past_value: Floats,
    past_lengths: Int64s,
    cos: Floats,
    sin: Floats,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[Floats, Floats, Floats]:
    """What it means with tables: the rotation, then the other op."""
    out, present_key, present_value = PlainCachedAttention(
        Rotate(query, cos, sin, past_lengths),
        Rotate(key, cos, sin, past_lengths),
        value,
        past_key,
        past_value,
        past_lengths,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
    )
    return out, present_key, present_value
