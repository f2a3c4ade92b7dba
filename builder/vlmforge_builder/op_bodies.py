"""The neutral ops as ONNX functions in standard ops (opset 23): their meaning and their oracle."""

from __future__ import annotations

from onnxscript import FLOAT, INT64, script
from onnxscript import opset23 as op
from onnxscript.values import Opset

from vlmforge_builder.ops import DOMAIN, VERSION

_domain = Opset(DOMAIN, VERSION)


@script(_domain, default_opset=op)
def PlainCachedAttention(  # noqa: N802 - an ONNX function carries its op's name
    query: FLOAT[...],
    key: FLOAT[...],
    value: FLOAT[...],
    past_key: FLOAT[...],
    past_value: FLOAT[...],
    past_lengths: INT64[...],
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[
    FLOAT[...],
    FLOAT[...],
    FLOAT[...],
]:
    """Body of `plain_cached_attention` in standard ops (opset 23)."""
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


@script(_domain, default_opset=op)
def Rotate(  # noqa: N802
    x: FLOAT[...], cos: FLOAT[...], sin: FLOAT[...], past_lengths: INT64[...]
) -> FLOAT[...]:
    """Rotary embedding of `[B, S, heads * D]` by position, in the tables' precision."""
    half = op.Shape(cos, start=1)
    split = op.Concat(op.Constant(value_ints=[0, 0, -1]), half * op.Constant(value_int=2), axis=0)
    length = op.Squeeze(op.Shape(x, start=1, end=2))
    steps = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    positions = op.Add(op.Unsqueeze(past_lengths, [1]), op.Unsqueeze(steps, [0]))  # [B, S]
    c = op.Unsqueeze(op.Gather(cos, positions), [2])
    s = op.Unsqueeze(op.Gather(sin, positions), [2])
    first, second = op.Split(op.CastLike(op.Reshape(x, split), cos), num_outputs=2, axis=-1)
    turned = op.Concat(first * c - second * s, second * c + first * s, axis=-1)
    return op.CastLike(op.Reshape(turned, op.Shape(x)), x)


@script(_domain, default_opset=op)
def CachedAttention(  # noqa: N802
    query: FLOAT[...],
    key: FLOAT[...],
    value: FLOAT[...],
    past_key: FLOAT[...],
    past_value: FLOAT[...],
    cos: FLOAT[...],
    sin: FLOAT[...],
    past_lengths: INT64[...],
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[
    FLOAT[...],
    FLOAT[...],
    FLOAT[...],
]:
    """Body of `cached_attention`: the rotation, then the other op."""
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
