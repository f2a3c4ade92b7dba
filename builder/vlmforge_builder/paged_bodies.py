"""The paged attention ops of the GPU targets as ONNX functions: their meaning and their oracle.

The plugin that runs them is `vlmforge_plugins.cached_attention`; its kernels do the same.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import FLOAT, INT32, script
from onnxscript import opset23 as op
from onnxscript.values import Opset

from vlmforge_builder.ops import DOMAIN, VERSION

_domain = Opset(DOMAIN, VERSION)


@script(_domain, default_opset=op)
def PlainPagedAttention(  # noqa: N802 - an ONNX function carries its op's name
    query: FLOAT[...],
    key: FLOAT[...],
    value: FLOAT[...],
    key_pool: FLOAT[...],
    value_pool: FLOAT[...],
    past_lengths: INT32[...],
    query_lengths: INT32[...],
    block_table: INT32[...],
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[
    FLOAT[...],
    FLOAT[...],
    FLOAT[...],
]:
    """Write new keys and values to the pools' pages, and attend over a sequence's pages.

    `key_pool`, `value_pool`: `[pages, kv_heads, page_size, D]`. Page p of sequence b is
    `block_table[b, p]`. Of the S rows of sequence b, the first `query_lengths[b]` are tokens.
    """
    d = op.Shape(key_pool, start=3)
    page_size = op.Cast(op.Squeeze(op.Shape(key_pool, start=2, end=3)), to=6)
    split = op.Concat(op.Constant(value_ints=[0, 0]), op.Constant(value_ints=[-1]), d, axis=0)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    steps = op.Cast(op.Range(zero, op.Squeeze(op.Shape(query, start=1, end=2)), one), to=6)
    positions = op.Add(op.Unsqueeze(past_lengths, [1]), op.Unsqueeze(steps, [0]))  # [B, S]
    held = op.Less(op.Unsqueeze(steps, [0]), op.Unsqueeze(query_lengths, [1]))  # [B, S]
    # Of each token that is there: its sequence and row, then its page and place in the page.
    token = op.Transpose(op.NonZero(held), perm=[1, 0])  # [N, 2]
    place = op.GatherND(positions, token)  # [N]
    column = op.Cast(op.Div(place, page_size), to=7)
    sequence = op.Slice(token, [0], [1], [1])  # [N, 1]
    page = op.GatherND(block_table, op.Concat(sequence, op.Unsqueeze(column, [1]), axis=1))
    slot = op.Mod(place, page_size)
    target = op.Cast(op.Concat(op.Unsqueeze(page, [1]), op.Unsqueeze(slot, [1]), axis=1), to=7)
    new_key = op.GatherND(op.Reshape(key, split), token)  # [N, kv_heads, D]
    new_value = op.GatherND(op.Reshape(value, split), token)
    by_place = op.ScatterND(op.Transpose(key_pool, perm=[0, 2, 1, 3]), target, new_key)
    key_pool_out = op.Transpose(by_place, perm=[0, 2, 1, 3])
    value_by_place = op.ScatterND(op.Transpose(value_pool, perm=[0, 2, 1, 3]), target, new_value)
    value_pool_out = op.Transpose(value_by_place, perm=[0, 2, 1, 3])
    # Each sequence's pages in a row; what no token of it wrote is neither seen nor counted.
    kv = op.Shape(key_pool, start=1, end=2)
    batch = op.Shape(query, start=0, end=1)
    pages = op.Max(block_table, op.Cast(zero, to=6))
    row = op.Concat(batch, kv, op.Constant(value_ints=[-1]), d, axis=0)
    k = op.Reshape(op.Transpose(op.Gather(key_pool_out, pages), perm=[0, 2, 1, 3, 4]), row)
    v = op.Reshape(op.Transpose(op.Gather(value_pool_out, pages), perm=[0, 2, 1, 3, 4]), row)
    columns = op.Cast(op.Range(zero, op.Squeeze(op.Shape(k, start=2, end=3)), one), to=6)
    total = op.Unsqueeze(op.Add(past_lengths, query_lengths), [1])
    written = op.Less(op.Unsqueeze(columns, [0]), total)  # [B, keys]
    none = op.CastLike(op.Constant(value_float=0.0), v)
    v = op.Where(op.Unsqueeze(written, [1, 3]), v, none)
    q = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])
    n_s = op.Shape(query, start=1, end=2)
    grouped = op.Concat(batch, kv, op.Constant(value_ints=[-1]), n_s, d, axis=0)
    scores = op.MatMul(
        op.Reshape(q, grouped), op.Transpose(op.Unsqueeze(k, [2]), perm=[0, 1, 2, 4, 3])
    )
    scores = scores * scale
    visible = op.LessOrEqual(op.Unsqueeze(columns, [0, 1]), op.Unsqueeze(positions, [2]))
    minus_infinity = op.CastLike(op.Constant(value_float=float("-inf")), scores)
    scores = op.Where(op.Unsqueeze(visible, [1, 2]), scores, minus_infinity)
    out = op.MatMul(op.Softmax(scores, axis=-1), op.Unsqueeze(v, [2]))
    flat = op.Concat(batch, op.Constant(value_ints=[-1]), n_s, d, axis=0)
    merged = op.Transpose(op.Reshape(out, flat), perm=[0, 2, 1, 3])
    return op.Reshape(merged, op.Shape(query)), key_pool_out, value_pool_out


@script(_domain, default_opset=op)
def PagedAttention(  # noqa: N802
    query: FLOAT[...],
    key: FLOAT[...],
    value: FLOAT[...],
    key_pool: FLOAT[...],
    value_pool: FLOAT[...],
    past_lengths: INT32[...],
    query_lengths: INT32[...],
    block_table: INT32[...],
    cos: FLOAT[...],
    sin: FLOAT[...],
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[
    FLOAT[...],
    FLOAT[...],
    FLOAT[...],
]:
    """The rotation of query and key by their positions, then the other op."""
    split = op.Concat(
        op.Constant(value_ints=[0, 0]),
        op.Constant(value_ints=[-1]),
        op.Shape(key_pool, start=3),
        axis=0,
    )
    length = op.Squeeze(op.Shape(query, start=1, end=2))
    steps = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    past = op.Cast(past_lengths, to=7)
    positions = op.Add(op.Unsqueeze(past, [1]), op.Unsqueeze(steps, [0]))  # [B, S]
    c = op.Unsqueeze(op.Gather(cos, positions), [2])
    s = op.Unsqueeze(op.Gather(sin, positions), [2])
    q1, q2 = op.Split(op.CastLike(op.Reshape(query, split), cos), num_outputs=2, axis=-1)
    k1, k2 = op.Split(op.CastLike(op.Reshape(key, split), cos), num_outputs=2, axis=-1)
    q = op.CastLike(op.Concat(q1 * c - q2 * s, q2 * c + q1 * s, axis=-1), query)
    k = op.CastLike(op.Concat(k1 * c - k2 * s, k2 * c + k1 * s, axis=-1), key)
    out, key_pool_out, value_pool_out = PlainPagedAttention(
        op.Reshape(q, op.Shape(query)),
        op.Reshape(k, op.Shape(key)),
        value,
        key_pool,
        value_pool,
        past_lengths,
        query_lengths,
        block_table,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
    )
    return out, key_pool_out, value_pool_out


def paged_functions() -> tuple[ir.Function, ...]:
    """The bodies of both ops, for a model that is to run without the plugin."""
    bodies = (PlainPagedAttention, PagedAttention)
    return tuple(ir.serde.deserialize_function(body.to_function_proto()) for body in bodies)
