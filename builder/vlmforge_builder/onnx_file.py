"""A lowered graph as a file: its interface, and its weights in a data file beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from vlmforge.engine.interface import Interface
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import BuildError
from vlmforge_builder.weights import Layout

# Where ONNX has another name than the manifest.
_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float64": ir.DataType.DOUBLE,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
}


def unread(dtype: ir.DataType, shape: ir.Shape) -> ir.LazyTensor:
    """A tensor for an initialiser whose values are to stay in their file."""
    return ir.LazyTensor(_no_values, dtype=dtype, shape=shape)


def _no_values() -> ir.TensorProtocol:
    raise BuildError("A pass asked for the values of a weight; passes may only move references.")


def refer(model: ir.Model, layout: Layout, data: Path) -> None:
    """Point the initialisers at their places in the data file."""
    for place in (place for item in layout for place in item.places):
        tensor = place.tensor
        value = model.graph.initializers[tensor.name]
        dtype = value.dtype
        assert dtype is not None
        value.const_value = ir.ExternalTensor(
            data.name,
            place.offset,
            tensor.size,
            dtype,
            shape=ir.Shape(tensor.shape),
            name=tensor.name,
            base_dir=data.parent,
        )


def check_interface(graph: ir.Graph, interface: Interface) -> None:
    """Raises BuildError where a graph takes or gives other than `interface` says."""
    for values, listed in ((graph.inputs, interface.inputs), (graph.outputs, interface.outputs)):
        found = tensor_specs(values)
        if found != listed:
            odd = [spec for spec in (*found, *listed) if spec not in found or spec not in listed]
            raise BuildError(
                "A graph's inputs or outputs are not those that the runtime will bind.",
                found=", ".join(str(spec) for spec in found if spec in odd) or "an other order",
                expected=", ".join(str(spec) for spec in listed if spec in odd) or "the list's",
                fix="correct the recipe or the pass, or vlmforge/engine/interface.py",
            )


def add_input(graph: ir.Graph, spec: TensorSpec) -> ir.Value:
    """Give a graph an input of the runtime's list."""
    value = ir.Value()
    describe(value, spec)
    graph.inputs.append(value)
    return value


def describe(value: ir.Value, spec: TensorSpec) -> None:
    """Give a value the name, the type and the shape of the runtime's list."""
    dtype = _TYPES.get(spec.dtype) or ir.DataType[spec.dtype.upper()]
    value.name, value.type, value.shape = spec.name, ir.TensorType(dtype), ir.Shape(spec.shape)


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of a graph."""
    return tuple(_spec(value) for value in values)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    shape = value.shape if value.shape is not None else ()
    dims = tuple(d if isinstance(d, int) else str(d) for d in shape)
    names = {dtype: name for name, dtype in _TYPES.items()}
    return TensorSpec(value.name or "", names.get(value.dtype, value.dtype.name.lower()), dims)
