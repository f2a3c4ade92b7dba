"""Weights by reference: where a parameter's values are, and a writer that streams them to a file.

Nothing here holds more than one parameter in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from vlmforge.errors import TensorError
from vlmforge_builder.checkpoint.store import TensorStore, expect
from vlmforge_builder.dtypes import DTYPE_NAMES
from vlmforge_builder.shares import Share, share_of

# Page-aligned tensors can be mapped straight from the file.
ALIGNMENT = 4096
DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "int4": 4}


@dataclass(frozen=True, slots=True)
class Numbers:
    """A matrix or table in whole numbers already.

    Attributes:
        numbers: int8, of the parameter's shape.
        scales: What one unit is worth, for each block of neighbours along an axis.
    """

    numbers: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.numbers.shape


Values: TypeAlias = Tensor | Numbers


class Weight(Protocol):
    """The values of one parameter."""

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint's tensors that it is made of."""

    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Values:
        """The values in their stored dtype, of the parameter's `shape` (TensorError otherwise)."""

    def views(self, store: TensorStore, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The same as tensors side by side along the last axis, to be sliced.

        On pages of the checkpoint's files where the arrangement allows it: what is not used of them
        then takes no memory.
        """
        values = self.read(store, shape)
        assert isinstance(values, Tensor)
        return (values,)

    def read_share(self, store: TensorStore, shape: tuple[int, ...], share: Share) -> Values:
        """A share of the values, of the whole parameter's `shape`; see `views`."""
        return share_of(self.views(store, shape), share)

    @property
    def kept_dtype(self) -> str | None:
        """The dtype that the parameter has whatever the engine's is; None: the engine's."""
        return None


@dataclass(frozen=True, slots=True)
class Stored(Weight):
    """A tensor of the checkpoint, as it is."""

    key: str

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.key,)

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        expect(store, self.key, shape)
        return store.read(self.key)


@dataclass(frozen=True, slots=True)
class Transposed(Weight):
    """Matrices `[out_i, in]` of the checkpoint, stacked and transposed to `[in, sum of out_i]`.

    `widths` are the expected `out_i`.
    """

    keys: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self.keys

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        return torch.cat(self.views(store, shape), dim=1)

    @override
    def views(self, store: TensorStore, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        for key, width in zip(self.keys, self.widths, strict=True):
            expect(store, key, (width, shape[0]))
        return tuple(store.read(key).T for key in self.keys)


@dataclass(frozen=True, slots=True)
class Stacked(Weight):
    """Vectors of the checkpoint, one after the other; `widths` are their expected lengths."""

    keys: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self.keys

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        return torch.cat(self.views(store, shape))

    @override
    def views(self, store: TensorStore, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        del shape
        for key, width in zip(self.keys, self.widths, strict=True):
            expect(store, key, (width,))
        return tuple(store.read(key) for key in self.keys)


@dataclass(frozen=True, slots=True)
class Computed(Weight):
    """Values that follow from the configuration; kept in fp32 whatever the engine's dtype."""

    compute: Callable[[], Tensor]

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return ()

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        del store, shape
        return self.compute()

    @property
    @override
    def kept_dtype(self) -> str:
        return "float32"


@dataclass(frozen=True, slots=True)
class Sliced(Weight):
    """A rank's share of `weight`, a vector or matrix of the shape `whole`."""

    weight: Weight
    whole: tuple[int, ...]
    share: Share

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return self.weight.names

    @property
    @override
    def kept_dtype(self) -> str | None:
        return self.weight.kept_dtype

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Values:
        return self.weight.read_share(store, self.whole, self.share)


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A tensor of a data file: name, dtype ("int4": two to a byte) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return -(-torch.Size(self.shape).numel() * _BITS[self.dtype] // 8)


class Encoding(Protocol):
    """How a parameter is written: the tensors that hold it."""

    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorShape, ...]:
        """What the tensors of a parameter of this name and shape are."""

    def encode(self, values: Values) -> tuple[Tensor, ...]:
        """Their contents, in the same order; what is no torch dtype comes as bytes."""


@dataclass(frozen=True, slots=True)
class AsDtype(Encoding):
    """`Encoding` of a parameter as one tensor of a floating dtype."""

    dtype: str

    @override
    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorShape, ...]:
        return (TensorShape(name, self.dtype, shape),)

    @override
    def encode(self, values: Values) -> tuple[Tensor, ...]:
        assert isinstance(values, Tensor)
        return (values.to(DTYPES[self.dtype]),)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a tensor lies in a data file. `offset` in bytes."""

    tensor: TensorShape
    offset: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.tensor.size


@dataclass(frozen=True, slots=True)
class PlacedParameter:
    """A parameter of a module by the tensors that hold it."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    places: tuple[Placed, ...]


Layout: TypeAlias = tuple[PlacedParameter, ...]


def stored_dtype(weight: Weight, dtype: str) -> str:
    """The dtype that a parameter is written in by an engine of `dtype`."""
    return weight.kept_dtype or dtype


def plan(shapes: Mapping[str, tuple[int, ...]], encodings: Mapping[str, Encoding]) -> Layout:
    """Lay parameters out one after the other, each tensor at a page boundary."""
    layout, offset = [], 0
    for name, shape in shapes.items():
        places = []
        for tensor in encodings[name].tensors(name, shape):
            places.append(Placed(tensor, offset))
            offset += -(-tensor.size // ALIGNMENT) * ALIGNMENT
        layout.append(PlacedParameter(name, shape, encodings[name], tuple(places)))
    return tuple(layout)


def weight_bytes(layout: Layout) -> int:
    """Bytes of all tensors, without what lies between them."""
    return sum(place.tensor.size for item in layout for place in item.places)


def write(
    path: Path, layout: Layout, weights: Mapping[str, Weight], store: TensorStore
) -> Iterator[tuple[int, int]]:
    """Stream the parameters of `layout` to `path`, yielding (bytes written, all) after each.

    Raises:
        TensorError: a missing tensor, a wrong shape, or a value that is not finite in the dtype.
    """
    position, total = 0, layout[-1].places[-1].end
    with path.open("wb") as file:
        for item in layout:
            tensors = _encoded(item, weights[item.name], store)
            for place, tensor in zip(item.places, tensors, strict=True):
                file.write(b"\0" * (place.offset - position))
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                position = place.end
            yield position, total


def _encoded(item: PlacedParameter, weight: Weight, store: TensorStore) -> tuple[Tensor, ...]:
    values = weight.read(store, item.shape)
    if tuple(values.shape) != item.shape:
        raise TensorError(
            f"The weights of {item.name} do not have the expected shape.",
            found=f"{tuple(values.shape)} from {weight}",
            expected=str(item.shape),
            fix="check that config.json belongs to these weight files",
        )
    tensors = item.encoding.encode(values)
    for tensor in tensors:
        if tensor.is_floating_point():
            _check_finite(item.name, weight, tensor)
    return tensors


def _check_finite(name: str, weight: Weight, values: Tensor) -> None:
    # aminmax propagates NaN and needs no temporary of the tensor's size.
    low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
    if not (torch.isfinite(low) and torch.isfinite(high)):
        dtype = str(values.dtype).removeprefix("torch.")
        raise TensorError(
            f"The weights of {name} are not finite.",
            found=f"values from {low.item()} to {high.item()} as {dtype}, from {weight}",
            expected="finite numbers",
            fix="download the checkpoint again; if it is whole, use --dtype float32 or bfloat16",
        )
