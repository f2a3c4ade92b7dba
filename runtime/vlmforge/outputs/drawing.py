"""Which of many tokens may be drawn, with what weights, and where a random number falls."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vlmforge.outputs.logprobs import Logits

_BLOCK = 1024
_OFF = 5e-6
"""More than float32 is off by, in the sum of all weights or in one of those that matter."""
_AROUND = np.array([1 - _OFF, 1 + _OFF])


def weights_of(logits: Logits, temperature: float, peak: np.float32) -> NDArray[np.float64]:
    """exp((logits - peak) / temperature): 1 where they are `peak`, the largest."""
    # The largest is 0 before the division: no temperature can overflow it.
    values: NDArray[np.float64] = np.subtract(logits, peak, dtype=np.float64)
    if temperature != 1:
        with np.errstate(over="ignore"):
            values /= temperature
    return np.exp(values, out=values)


def nucleus(
    logits: Logits, temperature: float, top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The smallest set of the likeliest that has `top_p` of all weight: its places and weights.

    Likeliest first, equals as they lie (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).

    Few mostly have nearly all of the weight. In float32 it costs little to see which: only theirs
    are calculated in float64, unless the set's end is nearer than float32 can tell.
    """
    peak = logits.max()
    with np.errstate(all="ignore"):
        rough: Logits = np.subtract(logits, peak)
        rough /= np.float32(temperature)
        np.exp(rough, out=rough)
    total = float(rough.sum())
    places = np.arange(len(logits)) if math.isnan(total) else _candidates(rough, total, top_p)
    weights = weights_of(logits[places], temperature, peak)
    order = np.argsort(-weights)
    sums = np.cumsum(weights[order])
    few, count = np.searchsorted(sums, top_p * total * _AROUND)
    if few != count or math.isnan(total):
        total = float(weights_of(logits, temperature, peak).sum())
        count = np.searchsorted(sums, top_p * total)
    kept = _in_order(weights, order, min(int(count) + 1, len(places)))
    return places[kept], weights[kept]


def _candidates(rough: Logits, total: float, top_p: float) -> NDArray[np.int64]:
    """Places of more than have `top_p` of all weight: of the likeliest, and of all like those."""
    # All below the last bound together have less than 1 - top_p, so none of them is needed.
    least = total * (1 - top_p) / (2 * len(rough))
    for bound in (1e-3, 1e-4, least):
        bound = max(bound, least)
        places = np.flatnonzero(rough >= bound * (1 - 4 * _OFF))
        found = rough[places]
        if float(found[found >= bound].sum()) > top_p * total * (1 + 4 * _OFF):
            return places
    return np.arange(len(rough))


def _in_order(
    weights: NDArray[np.float64], order: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """The first `count` places of a sorting that has equals in any order: now as they lie."""
    largest = weights[order[: count + 1]]
    if (largest[1:] == largest[:-1]).any():
        order = np.argsort(-weights, kind="stable")  # takes twice the time
    return order[:count]


def draw(ids: NDArray[np.int64] | None, weights: NDArray[np.float64], number: float) -> int:
    """Where the part `number` in [0, 1) of the whole weight ends: at none whose weight is 0."""
    begin, wanted = 0, number * float(weights.sum())
    if len(weights) > _BLOCK:  # then only the block where it ends is added up weight by weight
        sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
        block = _end(sums, wanted)
        begin, wanted = block * _BLOCK, wanted - float(sums[:block].sum())
    place = begin + _end(weights[begin : begin + _BLOCK], wanted)
    return place if ids is None else int(ids[place])


def _end(weights: NDArray[np.float64], wanted: float) -> int:
    """The first place up to which there is more than `wanted`, which rounding may put outside."""
    total = np.cumsum(weights)
    inside = max(0.0, min(wanted, float(np.nextafter(total[-1], 0))))
    return int(np.searchsorted(total, inside, side="right"))
