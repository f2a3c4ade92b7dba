"""Tensor-parallel ranks, of each of which a decoder is a part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `of` ranks, counted from 0."""

    index: int
    of: int


WHOLE = Rank(0, 1)
"""The one that has all."""
