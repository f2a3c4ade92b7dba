"""Paged attention: `CachedAttention` over pools of pages, as the kernels of the GPU targets do it.

The kernels are `vlmforge_plugins.cached_attention`. No block emits these ops: a pass makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript import script
from typing_extensions import override

from vlmforge_builder.ops.cached_attention import PlainCachedAttention, Rotate
from vlmforge_builder.ops.node import OPSET, Floats, In, Int32s, OpNode, Out, Table, op


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedAttentionNode(OpNode):
    """A node of either op; without `cos` and `sin` nothing is turned.

    The plugin finds its node by domain and type. `holds_kernels` is 1 for the one that carries the
    compiled kernels into the plan, for all.
    """

    op_types: ClassVar[tuple[str, ...]] = ("PagedAttention", "PlainPagedAttention")

    qkv: In
    key_pool: In
    value_pool: In
    past_lengths: In
    query_lengths: In
    block_table: In
    cos: Table | None = None
    sin: Table | None = None
    num_heads: int
    kv_num_heads: int
    scale: float
    key_scale: float
    value_scale: float
    holds_kernels: int = 0
    out: Out
    key_pool_out: Out
    value_pool_out: Out

    @property
    @override
    def op_type(self) -> str:
        return self.op_types[0 if self.rotary else 1]

    @property
    def rotary(self) -> tuple[ir.Value, ir.Value] | None:
        """Cosines and sines; None: nothing is turned."""
        return None if self.cos is None or self.sin is None else (self.cos, self.sin)

    @property
    def pools(self) -> tuple[tuple[ir.Value, ir.Value], ...]:
        """Of keys and of values: before the op, and after it."""
        return (self.key_pool, self.key_pool_out), (self.value_pool, self.value_pool_out)


@script(OPSET, default_opset=op)
def ReadPages(  # noqa: N802 - an ONNX function carries its op's name
    pool: Floats,
    past_lengths: Int32s,
    block_table: Int32s,
    rows: Floats,
    unit: float,
) -> Floats:
    """Each sequence's pages as one cache `[B, kv_heads, pages * page_size + S, D]`.

    Zero where no token is: unused pages may hold anything. Of `rows`' type; `unit` is what one of
    the pool is worth.
    """
    held_as = op.Mul(op.CastLike(pool, rows), op.CastLike(op.Constant(value_float=unit), rows))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    pages = op.Max(block_table, op.Cast(zero, to=6))  # unused entries may be negative
    batch, kv = op.Shape(block_table, start=0, end=1), op.Shape(pool, start=1, end=2)
    d = op.Shape(pool, start=3)
    shape = op.Concat(batch, kv, op.Constant(value_ints=[-1]), d, axis=0)
    cache = op.Reshape(op.Transpose(op.Gather(held_as, pages), perm=[0, 2, 1, 3, 4]), shape)
    places = op.Cast(op.Range(zero, op.Squeeze(op.Shape(cache, start=2, end=3)), one), to=6)
    held = op.Less(op.Unsqueeze(places, [0]), op.Unsqueeze(past_lengths, [1]))
    nothing = op.CastLike(op.Constant(value_float=0.0), cache)
    cache = op.Where(op.Unsqueeze(held, [1, 3]), cache, nothing)
    # Room for the new tokens, and for the padding behind them.
    room = op.Expand(nothing, op.Concat(batch, kv, op.Shape(rows, start=1, end=2), d, axis=0))
    return op.Concat(cache, room, axis=2)


@script(OPSET, default_opset=op)
def WritePages(  # noqa: N802
    pool: Floats,
    rows: Floats,
    past_lengths: Int32s,
    query_lengths: Int32s,
    block_table: Int32s,
    unit: float,
) -> Floats:
    """The pool with the first `query_lengths[b]` of `rows` `[B, S, kv_heads * D]` in its pages."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    page_size = op.Cast(op.Squeeze(op.Shape(pool, start=2, end=3)), to=6)
    steps = op.Cast(op.Range(zero, op.Squeeze(op.Shape(rows, start=1, end=2)), one), to=6)
    positions = op.Add(op.Unsqueeze(past_lengths, [1]), op.Unsqueeze(steps, [0]))  # [B, S]
    there = op.Less(op.Unsqueeze(steps, [0]), op.Unsqueeze(query_lengths, [1]))  # [B, S]
    # Of each token that is there: its sequence and row, then its page and place in the page.
    token = op.Transpose(op.NonZero(there), perm=[1, 0])  # [N, 2]
    place = op.GatherND(positions, token)  # [N]
    column = op.Unsqueeze(op.Cast(op.Div(place, page_size), to=7), [1])
    sequence = op.Slice(token, [0], [1], [1])  # [N, 1]
    page = op.GatherND(block_table, op.Concat(sequence, column, axis=1))
    slot = op.Mod(place, page_size)
    target = op.Cast(op.Concat(op.Unsqueeze(page, [1]), op.Unsqueeze(slot, [1]), axis=1), to=7)
    split = op.Concat(op.Constant(value_ints=[0, 0, -1]), op.Shape(pool, start=3), axis=0)
    new = op.GatherND(op.Reshape(rows, split), token)  # [N, kv_heads, D]
    stored = op.Div(new, op.CastLike(op.Constant(value_float=unit), new))
    by_place = op.Transpose(op.CastLike(pool, rows), perm=[0, 2, 1, 3])
    written = op.Transpose(op.ScatterND(by_place, target, stored), perm=[0, 2, 1, 3])
    return op.CastLike(written, pool)


@script(OPSET, default_opset=op)
def AsStored(rows: Floats, pool: Floats, unit: float) -> Floats:  # noqa: N802
    """New keys or values as they are read back from the pool."""
    size = op.CastLike(op.Constant(value_float=unit), rows)
    return op.Mul(op.CastLike(op.CastLike(op.Div(rows, size), pool), rows), size)


@script(OPSET, default_opset=op)
def SplitHeads(  # noqa: N802
    qkv: Floats, pool: Floats, num_heads: int, kv_num_heads: int
) -> tuple[Floats, Floats, Floats]:
    """Query, key and value of rows that hold them one after the other; D is the pool's."""
    d = op.Shape(pool, start=3)
    kv_width = op.Mul(d, op.Constant(value_int=kv_num_heads))
    widths = op.Concat(op.Mul(d, op.Constant(value_int=num_heads)), kv_width, kv_width, axis=0)
    query, key, value = op.Split(qkv, widths, axis=-1)
    return query, key, value


@script(OPSET, default_opset=op)
def PlainPagedAttention(  # noqa: N802
    qkv: Floats,
    key_pool: Floats,
    value_pool: Floats,
    past_lengths: Int32s,
    query_lengths: Int32s,
    block_table: Int32s,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    key_scale: float,
    value_scale: float,
) -> tuple[Floats, Floats, Floats]:
    """Write new keys and values to the pools' pages, and attend over a sequence's pages.

    `qkv` `[B, S, (heads + 2 * kv_heads) * D]` holds query, key and value of a token one after the
    other; the rows of what comes out, `[B * S, heads * D]`, are those of all sequences one after
    the other. `key_pool`, `value_pool`: `[pages, kv_heads, page_size, D]`. Page p of sequence b is
    `block_table[b, p]`. Of the S rows of sequence b, the first `query_lengths[b]` are tokens; what
    comes out for the others is arbitrary. `key_scale` and `value_scale` are what one unit of an fp8
    pool is worth; 1 for other pools.
    """
    query, key, value = SplitHeads(qkv, key_pool, num_heads=num_heads, kv_num_heads=kv_num_heads)
    out, _, _ = PlainCachedAttention(
        query,
        AsStored(key, key_pool, unit=key_scale),
        AsStored(value, value_pool, unit=value_scale),
        ReadPages(key_pool, past_lengths, block_table, key, unit=key_scale),
        ReadPages(value_pool, past_lengths, block_table, value, unit=value_scale),
        op.Cast(past_lengths, to=7),
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
    )
    key_pool_out = WritePages(
        key_pool, key, past_lengths, query_lengths, block_table, unit=key_scale
    )
    value_pool_out = WritePages(
        value_pool, value, past_lengths, query_lengths, block_table, unit=value_scale
    )
    width = op.Concat(op.Constant(value_ints=[-1]), op.Shape(query, start=2), axis=0)
    return op.Reshape(out, width), key_pool_out, value_pool_out


@script(OPSET, default_opset=op)
def PagedAttention(  # noqa: N802
    qkv: Floats,
    key_pool: Floats,
    value_pool: Floats,
    past_lengths: Int32s,
    query_lengths: Int32s,
    block_table: Int32s,
    cos: Floats,
    sin: Floats,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    key_scale: float,
    value_scale: float,
) -> tuple[Floats, Floats, Floats]:
    """The rotation of query and key by their positions, then the other op."""
    past = op.Cast(past_lengths, to=7)
    query, key, value = SplitHeads(qkv, key_pool, num_heads=num_heads, kv_num_heads=kv_num_heads)
    rotated_query = Rotate(query, cos, sin, past)
    rotated_key = Rotate(key, cos, sin, past)
    out, key_pool_out, value_pool_out = PlainPagedAttention(
        op.Concat(rotated_query, rotated_key, value, axis=-1),
        key_pool,
        value_pool,
        past_lengths,
        query_lengths,
        block_table,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    return out, key_pool_out, value_pool_out
