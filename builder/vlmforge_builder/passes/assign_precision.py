"""Give every value of a graph the type that it is calculated in, with the casts between them.

The exporter traces in float32. A strongly typed compiler takes the types that a graph says, so they
are said here: matrix products and attention in the engine's dtype, what meets a float32 table in
float32, and casts only where the two meet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from typing_extensions import override

from vlmforge_builder import ops

TYPES: Mapping[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
_FLOATS = frozenset(TYPES.values())
# Ops that run in the engine's dtype whatever their inputs come in.
_IN_DTYPE = frozenset({"MatMul", "Conv", "Attention"})


@dataclass(frozen=True)
class AssignPrecisionPass(ir.passes.InPlacePass):
    """Type a traced graph in float32.

    Attributes:
        dtype: What matrix products run in: a key of `TYPES`.
        parameters: The dtype that each weight is stored in.
        float32: Names of the graph's inputs and outputs that stay in float32; the other float ones
            are of `dtype`.
    """

    dtype: str
    parameters: Mapping[str, str]
    float32: Collection[str]

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if self.dtype == "float32":
            return ir.passes.PassResult(model, modified=False)
        graph, wanted = model.graph, TYPES[self.dtype]
        for name, stored in self.parameters.items():
            graph.initializers[name].type = ir.TensorType(TYPES[stored])
        for value in graph.inputs:
            if value.dtype in _FLOATS and value.name not in self.float32:
                value.type = ir.TensorType(wanted)
        casts = _Casts(graph, frozenset(self.parameters))
        for node in tuple(graph):
            _type_node(node, wanted, casts)
        for index, value in enumerate(graph.outputs):
            if value.dtype in _FLOATS:
                kept = value.name in self.float32
                _type_output(graph, index, value, ir.DataType.FLOAT if kept else wanted)
        return ir.passes.PassResult(model, modified=True)


class _Casts:
    """Casts of values, made once for each type; constants are converted instead."""

    def __init__(self, graph: ir.Graph, parameters: frozenset[str]) -> None:
        self._graph, self._parameters = graph, parameters
        self._made: dict[tuple[str, ir.DataType], ir.Value] = {}

    def is_constant(self, value: ir.Value) -> bool:
        """Whether its type is no one's business but its user's."""
        return value.const_value is not None and value.name not in self._parameters

    def to(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        """`value` as `wanted`, calculated before the node `before` at the latest."""
        if value.dtype == wanted:
            return value
        name = f"{value.name}_{wanted.name.lower()}"
        if (made := self._made.get((value.name or "", wanted))) is not None:
            return made
        if self.is_constant(value):
            result = self._converted(value, wanted, name)
        else:
            cast = ir.node("Cast", [value], attributes={"to": wanted}, name=name)
            result = cast.outputs[0]
            result.name, result.shape = name, value.shape
            result.type = ir.TensorType(wanted)
            self._graph.insert_before(before, cast)
        self._made[value.name or "", wanted] = result
        return result

    def _converted(self, value: ir.Value, wanted: ir.DataType, name: str) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy().astype(wanted.numpy())
        constant = ir.Value(
            name=name,
            type=ir.TensorType(wanted),
            shape=value.shape,
            const_value=ir.tensor(array, dtype=wanted, name=name),
        )
        self._graph.register_initializer(constant)
        return constant


def _type_node(node: ir.Node, wanted: ir.DataType, casts: _Casts) -> None:
    neutral = ops.read(node)
    kept = () if neutral is None else neutral.tables
    floats = [
        (index, value)
        for index, value in enumerate(node.inputs)
        if value is not None and value.dtype in _FLOATS and value not in kept
    ]
    if not floats and not _makes_floats(node):
        return
    chosen = wanted
    if node.op_type not in _IN_DTYPE and neutral is None:
        chosen = _common(value for _, value in floats if not casts.is_constant(value)) or wanted
    for index, value in floats:
        node.replace_input_with(index, casts.to(value, chosen, node))
    for value in node.outputs:
        if value.dtype in _FLOATS or value.dtype is None:
            value.type = ir.TensorType(chosen)


def _makes_floats(node: ir.Node) -> bool:
    return any(value.dtype in _FLOATS for value in node.outputs)


def _common(values: Iterable[ir.Value]) -> ir.DataType | None:
    """The one type of all values, or float32 where they differ."""
    types = {value.dtype for value in values}
    if len(types) > 1:
        return ir.DataType.FLOAT
    return next(iter(types), None)


def _type_output(graph: ir.Graph, index: int, value: ir.Value, wanted: ir.DataType) -> None:
    if value.dtype == wanted:
        return
    name, producer = value.name, value.producer()
    assert producer is not None
    value.name = f"{name}_{(value.dtype or wanted).name.lower()}"
    cast = ir.node("Cast", [value], attributes={"to": wanted}, name=f"{name}_cast")
    cast.outputs[0].name, cast.outputs[0].shape = name, value.shape
    cast.outputs[0].type = ir.TensorType(wanted)
    graph.append(cast)
    graph.outputs[index] = cast.outputs[0]
