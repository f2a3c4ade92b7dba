"""Tensor-parallel ranks, and what each has of things that can be counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlmforge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `of` ranks, counted from 0."""

    index: int
    of: int


WHOLE = Rank(0, 1)
"""The one that has all."""


def heads_of(heads: int, kv_heads: int, rank: Rank) -> tuple[int, tuple[int, ...]]:
    """How many heads of queries a rank has, and which of keys and values (all are `kv_heads`).

    Each of the latter serves as many of the rank's queries, one after the other.

    Raises:
        ConfigError: heads that cannot be divided by the ranks.
    """
    own = even_share(heads, rank, "attention heads").size
    group = math.gcd(own, heads // kv_heads)
    first = rank.index * own
    return own, tuple((first + i) * kv_heads // heads for i in range(0, own, group))


@dataclass(frozen=True, slots=True)
class EvenShare:
    """The rank's `size` of something, from `start` on."""

    start: int
    size: int


def even_share(count: int, rank: Rank, what: str) -> EvenShare:
    """The rank's part of `count` equal things (ConfigError: they do not divide)."""
    if count % rank.of:
        fitting = [str(n) for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"The decoder cannot be divided among {rank.of} ranks.",
            found=f"{count} {what}, tp {rank.of}",
            expected=f"a tp that divides them: {', '.join(fitting[:12])}",
            fix=f"--tp {max(n for n in range(1, rank.of + 1) if count % n == 0)}",
        )
    size = count // rank.of
    return EvenShare(rank.index * size, size)
