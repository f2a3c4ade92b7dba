"""Weights that a checkpoint holds in another arrangement or size than our layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from vlmforge.errors import TensorError
from vlmforge_builder.checkpoint.store import TensorStore, expect
from vlmforge_builder.weights import Weight


@dataclass(frozen=True, slots=True)
class Reshaped(Weight):
    """A tensor that is stored in another shape, such as with dimensions of one."""

    key: str
    stored: tuple[int, ...]

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.key,)

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        expect(store, self.key, self.stored)
        return store.read(self.key).reshape(shape)


@dataclass(frozen=True, slots=True)
class Gathered(Weight):
    """Rows of a table `[length, width]`, in an order of their own."""

    key: str
    length: int
    rows: tuple[int, ...]

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.key,)

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        expect(store, self.key, (self.length, shape[1]))
        return store.read(self.key)[list(self.rows)]


@dataclass(frozen=True, slots=True)
class ResizedGrid(Weight):
    """A table `[rows * rows, width]` of a square grid, resized to the parameter's grid.

    Bicubic in fp32 without aligned corners, as originals do at run time for a fixed image size.
    """

    key: str
    rows: int

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.key,)

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        expect(store, self.key, (self.rows**2, shape[1]))
        table, target = store.read(self.key), math.isqrt(shape[0])
        if target**2 != shape[0]:
            raise TensorError(
                f"{self.key} cannot be resized.",
                found=f"{shape[0]} places",
                expected="places of a square grid",
                fix="check that config.json belongs to these weight files",
            )
        if target == self.rows:
            return table
        if table.is_meta:  # no values to resize; torch takes long to find the shape
            return table.new_empty(shape)
        grid = table.float().reshape(1, self.rows, self.rows, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
        return resized.permute(0, 2, 3, 1).flatten(0, 2)


@dataclass(frozen=True, slots=True)
class PerHead(Weight):
    """Projections that are stored head by head, each head's parts together, as ours: part by part.

    A matrix `[heads * parts * head_dim, in]` becomes `[in, parts * heads * head_dim]`, a bias keeps
    its one dimension.
    """

    key: str
    heads: int
    parts: int = 3

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.key,)

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        expect(store, self.key, shape[::-1])
        stored = store.read(self.key)
        apart = stored.reshape(self.heads, self.parts, -1, *stored.shape[1:])
        by_part = apart.transpose(0, 1).flatten(0, 2)
        return by_part.T if by_part.ndim == 2 else by_part


@dataclass(frozen=True, slots=True)
class Rows(Weight):
    """Some rows of a tensor that has `total`, from row `start` on.

    A matrix `[total, in]` becomes `[in, n]`, a bias `[total]` becomes `[n]`.
    """

    key: str
    start: int
    total: int

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.key,)

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        expect(store, self.key, (self.total, *shape[:-1]))
        rows = store.read(self.key)[self.start : self.start + shape[-1]]
        return rows.T if rows.ndim == 2 else rows
