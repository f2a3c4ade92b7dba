"""The graph that chooses tokens from logits as the host's sampler does, from the same numbers.

    edited by penalties and bans -> the likeliest `CANDIDATES` -> temperature, top-k, top-p, min-p
                                 -> where a random part of the whole weight ends

All in float64, as the host calculates (`vlmforge.outputs.sampling`), and row by row: what else is
in the batch plays no part. A row that it takes more candidates to choose for, or whose logits are
not finite, says so, and the host chooses for it.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx.inliner import inline_local_functions
from onnxscript import script

from vlmforge.engine.interface import (
    BATCH,
    BEST_IDS,
    BEST_LOGITS,
    CHOICES,
    CHOSEN,
    CHOSEN_LOGIT,
    EDIT_FACTORS,
    EDIT_IDS,
    EDIT_MINUS,
    LOGITS,
    NORMALISER,
    REPORTED,
)
from vlmforge.engine.tensors import TensorSpec
from vlmforge_builder.onnx_file import add_input, describe
from vlmforge_builder.ops.node import DOMAIN, OPSET, VERSION, Floats, Int64s, op

CANDIDATES = 1024
"""ONNX Runtime's CUDA provider finds as many at once in all rows; the host seldom needs more."""
_OPSET = 23
_BLOCK = 256
# Eight numbers of float64 for each logit at once, at most.
_BYTES = 8 * 8


@script(OPSET, default_opset=op)
def EditLogits(  # noqa: N802 - an ONNX function carries its op's name
    rows: Floats, ids: Int64s, factors: Floats, minus: Floats
) -> Floats:
    """Penalties and bans: `factors` divide positive logits and multiply others, then `minus` goes.

    An id may be there more than once, with the same numbers.
    """
    before = op.GatherElements(rows, ids, axis=1)
    negative = op.Less(before, op.Constant(value_float=0.0))
    penalised = op.Where(negative, op.Mul(before, factors), op.Div(before, factors))
    after = op.Cast(op.Sub(op.Cast(penalised, to=11), minus), to=1)
    return op.ScatterElements(rows, ids, after, axis=1)


@script(OPSET, default_opset=op)
def LikeliestIds(edited: Floats, vocab_size: int, candidates: int) -> Int64s:  # noqa: N802
    """Ids `[B, candidates]` of the largest, largest first, and of equal ones the lowest ids.

    TopK promises no order of equals on a GPU: so each float32 is made smaller by its id, by less
    than to the next float32, and by some for 0 too.
    """
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    each = op.Cast(op.Range(zero, op.Constant(value_int=vocab_size), one), to=11)
    least = op.Cast(op.Constant(value_float=-3.4028234663852886e38), to=11)  # not -inf
    tiny = op.Cast(op.Constant(value_float=1.1754943508222875e-38), to=11)
    step = op.Cast(op.Constant(value_float=1.1368683772161603e-13), to=11)  # 2 ** -43
    value = op.Max(edited, least)
    size = op.Mul(op.Add(op.Abs(value), tiny), step)
    count = op.Unsqueeze(op.Constant(value_int=candidates), [0])
    _, ids = op.TopK(op.Sub(value, op.Mul(size, each)), count, axis=-1)
    return ids


@script(OPSET, default_opset=op)
def LastSum(sums: Floats) -> Floats:  # noqa: N802
    """The last of each row, `[B, 1]`."""
    return op.Gather(sums, op.Constant(value_ints=[-1]), axis=1)


@script(OPSET, default_opset=op)
def CountWithin(sums: Floats, target: Floats) -> Int64s:  # noqa: N802
    """How many of each row's sums are within `target`, `[B, 1]`."""
    within = op.Cast(op.LessOrEqual(sums, target), to=11)
    return op.Cast(op.ReduceSum(within, [1], keepdims=1), to=7)


@script(OPSET, default_opset=op)
def KeptCandidates(  # noqa: N802
    weights: Floats,
    whole: Floats,
    top_k: Floats,
    top_p: Floats,
    min_p: Floats,
    limited: Floats,
    candidates: int,
) -> tuple[Floats, Floats]:
    """Weights `[B, candidates]` of those that may be drawn, 0 of others; whether that is known.

    `whole` is the weight of all tokens; `limited` where top-k leaves some out.
    """
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    count = op.Constant(value_int=candidates)
    rank = op.Cast(op.Range(zero, count, one), to=11)
    nothing, single = op.Cast(zero, to=11), op.Cast(one, to=11)
    there = op.Where(op.Less(rank, top_k), weights, nothing)
    sums = op.CumSum(there, one)
    total = op.Where(limited, LastSum(sums), whole)
    enough = op.Mul(top_p, total)
    needed = op.Or(op.Less(op.Sub(sums, there), enough), op.Less(rank, single))
    all_of_them = op.GreaterOrEqual(top_p, single)
    kept = op.And(op.Or(all_of_them, needed), op.GreaterOrEqual(weights, min_p))
    few = op.LessOrEqual(top_k, op.Cast(count, to=11))
    reached = op.GreaterOrEqual(LastSum(sums), enough)
    known = op.Or(op.And(limited, few), op.And(op.Not(limited), reached))
    return op.Where(kept, there, nothing), known


@script(OPSET, default_opset=op)
def DrawFromAll(  # noqa: N802
    weights: Floats, draw: Floats, vocab_size: int, padded_size: int, last_block: int
) -> Int64s:
    """The id `[B, 1]` where a part `draw` of all weights ends, in the order of ids.

    By the sums of blocks, and within one: sums of a whole row take long on a GPU.
    """
    zero = op.Cast(op.Constant(value_float=0.0), to=11)
    # Gathered: the CUDA provider has no Pad of this version, and what its Concat is told of sizes
    # is not there any more when a captured graph is replayed.
    start, step = op.Constant(value_int=0), op.Constant(value_int=1)
    each = op.Range(start, op.Constant(value_int=padded_size), step)
    size = op.Constant(value_int=vocab_size)
    there = op.Cast(op.Less(each, size), to=11)
    padded = op.Mul(op.Gather(weights, op.Min(each, op.Sub(size, step)), axis=1), there)
    blocks = op.Reshape(padded, op.Constant(value_ints=[0, -1, _BLOCK]))
    of_blocks = op.ReduceSum(blocks, [2], keepdims=0)
    sums = op.CumSum(of_blocks, op.Constant(value_int=1))
    target = op.Mul(draw, LastSum(sums))
    before = op.ReduceSum(op.Where(op.LessOrEqual(sums, target), of_blocks, zero), [1], keepdims=1)
    chosen = op.Min(CountWithin(sums, target), op.Constant(value_int=last_block))
    places = op.Expand(op.Unsqueeze(chosen, [2]), op.Constant(value_ints=[1, 1, _BLOCK]))
    weights_there = op.Squeeze(op.GatherElements(blocks, places, axis=1), [1])
    inside = op.CumSum(weights_there, op.Constant(value_int=1))
    # Sums that are made in another order differ in their last digits: never end at no weight.
    end = LastSum(inside)
    little = op.Cast(op.Constant(value_float=9.094947017729282e-13), to=11)  # 2 ** -40
    rest = op.Max(op.Min(op.Sub(target, before), op.Sub(end, op.Mul(end, little))), zero)
    return op.Add(op.Mul(chosen, op.Constant(value_int=_BLOCK)), CountWithin(inside, rest))


@script(OPSET, default_opset=op)
def SampleToken(  # noqa: N802
    logits: Floats,
    choices: Floats,
    edit_ids: Int64s,
    edit_factors: Floats,
    edit_minus: Floats,
    vocab_size: int,
    candidates: int,
    reported: int,
    padded_size: int,
    last_candidate: int,
    last_block: int,
) -> tuple[Int64s, Floats, Floats, Int64s, Floats]:
    """What comes out is `CHOSEN` and what follows it in the interface, for choices as there."""
    rows = op.Squeeze(logits, [1])
    edited = op.Cast(EditLogits(rows, edit_ids, edit_factors, edit_minus), to=11)
    temperature = op.Gather(choices, op.Constant(value_ints=[0]), axis=1)
    top_k = op.Gather(choices, op.Constant(value_ints=[1]), axis=1)
    top_p = op.Gather(choices, op.Constant(value_ints=[2]), axis=1)
    min_p = op.Gather(choices, op.Constant(value_ints=[3]), axis=1)
    draw = op.Gather(choices, op.Constant(value_ints=[4]), axis=1)
    ids = LikeliestIds(edited, vocab_size=vocab_size, candidates=candidates)
    zero, one = op.Constant(value_float=0.0), op.Cast(op.Constant(value_float=1.0), to=11)
    first = op.Gather(ids, op.Constant(value_ints=[0]), axis=1)
    largest = op.GatherElements(edited, first, axis=1)
    behind = op.Sub(edited, largest)
    weights = op.Exp(op.Div(behind, temperature))
    every = op.Cast(op.Constant(value_int=vocab_size), to=11)
    limited = op.Less(top_k, every)
    by_rank = op.Or(limited, op.Less(top_p, one))
    top, whole = op.GatherElements(weights, ids, axis=1), op.ReduceSum(weights, [1], keepdims=1)
    kept, known = KeptCandidates(top, whole, top_k, top_p, min_p, limited, candidates=candidates)
    sums = op.CumSum(kept, op.Constant(value_int=1))
    ends = CountWithin(sums, op.Mul(draw, LastSum(sums)))
    rank = op.Min(ends, op.Constant(value_int=last_candidate))
    likely = op.Where(op.GreaterOrEqual(weights, min_p), weights, op.Cast(zero, to=11))
    from_all = DrawFromAll(
        likely,
        draw,
        vocab_size=vocab_size,
        padded_size=padded_size,
        last_block=last_block,
    )
    drawn = op.Where(by_rank, op.GatherElements(ids, rank, axis=1), from_all)
    greedy = op.Less(draw, op.Cast(zero, to=11))
    token = op.Where(greedy, first, drawn)
    # The sum of nothing but zeros, unless one of them is no number; so is the difference.
    raw = op.ReduceSum(op.Mul(rows, zero), [1], keepdims=1)
    broken = op.Or(op.IsNaN(raw), op.IsNaN(op.Sub(largest, largest)))
    unknown = op.And(op.And(by_rank, op.Not(known)), op.Not(greedy))
    found = op.Where(op.Or(broken, unknown), op.Constant(value_int=-2), token)
    normaliser = op.Add(largest, op.Log(op.ReduceSum(op.Exp(behind), [1], keepdims=1)))
    count = op.Unsqueeze(op.Constant(value_int=reported), op.Constant(value_ints=[0]))
    best = op.Slice(ids, op.Constant(value_ints=[0]), count, op.Constant(value_ints=[1]))
    logit = op.GatherElements(edited, token, axis=1)
    logits_of_best = op.GatherElements(edited, best, axis=1)
    return found, logit, normaliser, best, logits_of_best


_FUNCTIONS = (
    SampleToken,
    DrawFromAll,
    KeptCandidates,
    CountWithin,
    LastSum,
    LikeliestIds,
    EditLogits,
)


def sample_token(vocab_size: int) -> ir.Model:
    """`SampleToken` as a graph of its own, for logits float32 `[batch, 1, vocab_size]`."""
    reported, candidates = min(REPORTED, vocab_size), min(CANDIDATES, vocab_size)
    attributes = {
        "vocab_size": vocab_size,
        "candidates": candidates,
        "reported": reported,
        "padded_size": -(-vocab_size // _BLOCK) * _BLOCK,
        "last_candidate": candidates - 1,
        "last_block": (vocab_size - 1) // _BLOCK,
    }
    node = ir.node("SampleToken", [], attributes=attributes, domain=DOMAIN, num_outputs=5)
    imports = {"": _OPSET, DOMAIN: VERSION}
    graph = ir.Graph([], node.outputs, nodes=[node], opset_imports=imports, name=CHOSEN.name)
    logits = TensorSpec(LOGITS, "float32", (BATCH, 1, vocab_size))
    given = [
        add_input(graph, spec) for spec in (logits, CHOICES, EDIT_IDS, EDIT_FACTORS, EDIT_MINUS)
    ]
    node.resize_inputs(len(given))
    for index, value in enumerate(given):
        node.replace_input_with(index, value)
    best = BATCH, reported
    outputs = (TensorSpec(BEST_IDS, "int64", best), TensorSpec(BEST_LOGITS, "float64", best))
    for out, spec in zip(node.outputs, (CHOSEN, CHOSEN_LOGIT, NORMALISER, *outputs), strict=True):
        describe(out, spec)
    model = ir.Model(graph, ir_version=10, producer_name="vlmforge")
    for body in _FUNCTIONS:
        function = ir.serde.deserialize_function(body.to_function_proto())
        model.functions[function.identifier()] = function
    return ir.from_proto(inline_local_functions(ir.to_proto(model)))


def sampling_bytes(vocab_size: int) -> int:
    """Bytes that the graph takes for each row, at most; an estimate."""
    return _BYTES * vocab_size
