"""What logits say of tokens: the likeliest, and the logarithms of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Logits: TypeAlias = NDArray[np.float32]


def top_ids(logits: Logits, count: int) -> NDArray[np.int64]:
    """The ids of the `count` largest logits, largest first; of equal ones the lowest ids."""
    count = min(count, len(logits))
    ids = np.flatnonzero(logits >= _bound(logits, count))
    order = np.lexsort((ids, -logits[ids]))
    return ids[order[:count]]


def _bound(logits: Logits, count: int) -> np.float32:
    """At least `count` logits are not below it, and mostly few more.

    If there are as many parts, that many of them have their largest logit above it. That is a
    third of the work of looking for it among all.
    """
    parts = len(logits) // _PART
    if count <= parts:
        logits = logits[: parts * _PART].reshape(_PART, parts).max(axis=0)
    bound: np.float32 = np.partition(logits, -count)[-count]
    return bound


_PART = 64


def top_logprobs(logits: Logits, count: int, chosen: int) -> dict[int, float]:
    """Log-probabilities of the `count` likeliest tokens, best first, and of `chosen`."""
    normaliser = _log_sum_exp(logits)
    ids = [int(i) for i in top_ids(logits, count) if logits[i] > -np.inf]
    if chosen not in ids:
        ids.append(chosen)
    return {i: float(logits[i]) - normaliser for i in ids}


def mean_cross_entropy(logits: NDArray[np.float32], targets: Sequence[int]) -> float:
    """Mean of -log p(target), in nats: the logarithm of the perplexity.

    Args:
        logits: `[n, vocab]`, row i from before target i.
        targets: n ids, n > 0.
    """
    losses = [
        _log_sum_exp(row) - float(row[target]) for row, target in zip(logits, targets, strict=True)
    ]
    return math.fsum(losses) / len(losses)


def _log_sum_exp(logits: Logits) -> float:
    values = logits.astype(np.float64)
    peak = float(values.max())
    return peak + math.log(float(np.exp(values - peak).sum()))
