"""Which of many weights are kept, and where a random number falls among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-9
_BLOCK = 1024


def nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Places of the smallest set of the largest that has `top_p` of all weight, or more.

    Largest first, equals as they lie. The largest is 1. Sorting places is what costs: mostly few
    have nearly all of the weight, and sorted values, which cost far less, tell how few.
    """
    total = float(weights.sum())
    enough = top_p * total
    # All places below this bound together hold less than 1 - top_p, so none of them is needed.
    least = (total - enough) / (2 * len(weights))
    for bound in (1e-4, least):
        places = np.flatnonzero(weights >= max(bound, least))
        values = weights[places]
        if values.sum() > enough * (1 + _ROUNDING):
            break
    largest = np.sort(values)[::-1]
    before = np.cumsum(largest) - largest
    count = max(1, int(np.count_nonzero(before < enough)))
    places = places[values >= largest[count - 1]]
    alike = (largest[1:count] == largest[: count - 1]).any() or len(places) > count
    order = np.argsort(-weights[places], kind="stable" if alike else None)  # which is faster
    kept: NDArray[np.int64] = places[order[:count]]
    return kept


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
