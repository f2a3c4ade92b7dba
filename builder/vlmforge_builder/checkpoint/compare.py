"""Whether two stored tensors have the same values, a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmforge_builder.checkpoint.mapped import torch_dtype
from vlmforge_builder.checkpoint.store import TensorStore

_BLOCK = 1 << 22
# From wide to narrow: what is stored in two dtypes is the same if it is in the narrower one.
_WIDTHS = ("float64", "float32", "float16", "bfloat16")


def same_values(first: TensorStore, name: str, second: TensorStore, other: str) -> bool:
    """Whether tensor `name` of one store equals `other` of another, up to the narrower dtype.

    Holds no more than a few blocks of 4 Mi elements beside the mapped files. NaN equals nothing.
    """
    left, right = first.info(name), second.info(other)
    if left.shape != right.shape:
        return False
    dtype = _narrower(left.dtype, right.dtype)
    if dtype is None:
        return False
    blocks = zip(_blocks(first.read(name)), _blocks(second.read(other)), strict=True)
    return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in blocks)


def _narrower(left: str, right: str) -> torch.dtype | None:
    """The dtype to compare in; None where nothing stored in the two can be called the same."""
    if left == right:
        return torch_dtype(left)
    if left not in _WIDTHS or right not in _WIDTHS:
        return None
    return torch_dtype(max(left, right, key=_WIDTHS.index))


def _blocks(values: Tensor) -> tuple[Tensor, ...]:
    if values.numel() == 0:
        return ()
    return torch.split(values.contiguous().view(-1), _BLOCK)
