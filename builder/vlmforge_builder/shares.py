"""What one tensor-parallel rank has of a weight, read by slice: no rank holds another's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Starts and ends along an axis, one after the other as they are kept."""


def width_of(ranges: Ranges) -> int:
    """How much they keep."""
    return sum(stop - start for start, stop in ranges)


def shifted(ranges: Ranges, by: int) -> Ranges:
    """The same ranges further on."""
    return tuple((start + by, stop + by) for start, stop in ranges)


def joined(ranges: Iterator[tuple[int, int]]) -> Ranges:
    """The same, with ranges that follow each other as one."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Share:
    """Of a weight: `ranges` of its `axis`, and then `padding` zeroes."""

    axis: int
    ranges: Ranges
    padding: int = 0

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The rank's shape, by that of the whole weight."""
        size = width_of(self.ranges) + self.padding
        return tuple(size if axis == self.axis else n for axis, n in enumerate(whole))


def share_of(views: Sequence[Tensor], share: Share) -> Tensor:
    """A share of the matrix or vector that `views` are, side by side along the last axis."""
    axis = share.axis
    if axis == views[0].ndim - 1:
        kept = [part for span in share.ranges for part in _within(views, span)]
    else:
        rows = ([view[start:stop] for view in views] for start, stop in share.ranges)
        kept = [_cat(parts, -1) for parts in rows]
    if share.padding:
        size = [share.padding if i == axis else n for i, n in enumerate(views[0].shape)]
        if axis == 0:
            size[1:] = [sum(view.shape[-1] for view in views)] * (len(size) - 1)
        kept.append(views[0].new_zeros(size))
    return _cat(kept, axis)


def _within(views: Sequence[Tensor], span: tuple[int, int]) -> Iterator[Tensor]:
    """Columns of views that lie side by side."""
    offset = 0
    for view in views:
        start, stop = (min(max(place - offset, 0), view.shape[-1]) for place in span)
        if start < stop:
            yield view[..., start:stop]
        offset += view.shape[-1]


def _cat(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=axis)
