"""Weights by reference: where a parameter's values are, and a writer that streams them to a file.

Nothing here holds more than one parameter in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from vlmforge.errors import TensorError
from vlmforge_builder.checkpoint.store import TensorStore, expect
from vlmforge_builder.dtypes import DTYPE_NAMES

# Page-aligned tensors can be mapped straight from the file.
ALIGNMENT = 4096
DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


class Weight(Protocol):
    """The values of one parameter."""

    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        """The values in their stored dtype, of the parameter's `shape` (TensorError otherwise)."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the checkpoint, as it is."""

    key: str

    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        """See `Weight.read`."""
        expect(store, self.key, shape)
        return store.read(self.key)


@dataclass(frozen=True, slots=True)
class Transposed:
    """Matrices `[out_i, in]` of the checkpoint, stacked and transposed to `[in, sum of out_i]`.

    `widths` are the expected `out_i`.
    """

    keys: tuple[str, ...]
    widths: tuple[int, ...]

    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        """See `Weight.read`."""
        for key, width in zip(self.keys, self.widths, strict=True):
            expect(store, key, (width, shape[0]))
        return torch.cat([store.read(key).T for key in self.keys], dim=1)


@dataclass(frozen=True, slots=True)
class Stacked:
    """Vectors of the checkpoint, one after the other; `widths` are their expected lengths."""

    keys: tuple[str, ...]
    widths: tuple[int, ...]

    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        """See `Weight.read`."""
        del shape
        for key, width in zip(self.keys, self.widths, strict=True):
            expect(store, key, (width,))
        return torch.cat([store.read(key) for key in self.keys])


@dataclass(frozen=True, slots=True)
class Computed:
    """Values that follow from the configuration; kept in fp32 whatever the engine's dtype."""

    compute: Callable[[], Tensor]

    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        """See `Weight.read`."""
        del store, shape
        return self.compute()


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a parameter lies in a data file. `offset` and `size` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def stored_dtype(weight: Weight, dtype: str) -> str:
    """The dtype that a parameter is written in by an engine of `dtype`."""
    return "float32" if isinstance(weight, Computed) else dtype


def plan(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> tuple[Placed, ...]:
    """Lay parameters out one after the other, each at a page boundary."""
    placed, offset = [], 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * DTYPES[dtypes[name]].itemsize
        placed.append(Placed(name, dtypes[name], shape, offset, size))
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return tuple(placed)


def write(
    path: Path, layout: Iterable[Placed], weights: Mapping[str, Weight], store: TensorStore
) -> Iterator[int]:
    """Stream the parameters of `layout` to `path`, yielding the bytes written after each.

    Raises:
        TensorError: a missing tensor, a wrong shape, or a value that is not finite in the dtype.
    """
    position = 0
    with path.open("wb") as file:
        for item in layout:
            file.write(b"\0" * (item.offset - position))
            _write_tensor(file, item, weights[item.name], store)
            position = item.offset + item.size
            yield position


def _write_tensor(file: BinaryIO, item: Placed, weight: Weight, store: TensorStore) -> None:
    values = weight.read(store, item.shape)
    if tuple(values.shape) != item.shape:
        raise TensorError(
            f"The weights of {item.name} do not have the expected shape.",
            found=f"{tuple(values.shape)} from {weight}",
            expected=str(item.shape),
            fix="check that config.json belongs to these weight files",
        )
    values = values.to(DTYPES[item.dtype]).contiguous()
    _check_finite(item, weight, values)
    file.write(values.view(-1).view(torch.uint8).numpy().data)


def _check_finite(item: Placed, weight: Weight, values: Tensor) -> None:
    # aminmax propagates NaN and needs no temporary of the tensor's size.
    low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise TensorError(
            f"The weights of {item.name} are not finite.",
            found=f"values from {low.item()} to {high.item()} as {item.dtype}, from {weight}",
            expected="finite numbers",
            fix="download the checkpoint again; if it is whole, use --dtype float32 or bfloat16",
        )


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
