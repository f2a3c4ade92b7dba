"""A lowered graph as a file: its interface, and its weights in a data file beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from vlmforge.manifest import TensorSpec
from vlmforge_builder.weights import Placed


def refer(model: ir.Model, layout: tuple[Placed, ...], data: Path) -> None:
    """Point the initialisers at their places in the data file."""
    for item in layout:
        value = model.graph.initializers[item.name]
        dtype = value.dtype
        assert dtype is not None
        value.const_value = ir.ExternalTensor(
            data.name,
            item.offset,
            item.size,
            dtype,
            shape=ir.Shape(item.shape),
            name=item.name,
            base_dir=data.parent,
        )


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of a graph."""
    return tuple(_spec(value) for value in values)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    shape = value.shape if value.shape is not None else ()
    dims = tuple(d if isinstance(d, int) else str(d) for d in shape)
    names = {ir.DataType.FLOAT: "float32"}
    return TensorSpec(value.name or "", names.get(value.dtype, value.dtype.name.lower()), dims)
