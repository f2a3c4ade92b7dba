"""Pieces of a graph that differ in nothing but names and weights are written as one file.

A session costs a GPU's memory and time to load, and most layers of a decoder are alike. What is
not the same in all of them, their weights, becomes inputs of the file's graph.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from msgspec import structs

from vlmforge.engine.chain import BoundWeight, Segment
from vlmforge_builder.chain_file import describe_piece
from vlmforge_builder.onnx_file import tensor_specs

_NAMES = "names of "


def save_alike(pieces: Sequence[ir.Model], stem: str, folder: Path) -> tuple[Segment, ...]:
    """Write the pieces as `<stem>.<number of the first of its kind>.onnx` and describe them."""
    kinds: dict[Hashable, list[int]] = {}
    for index, piece in enumerate(pieces):
        form = index if _folds(piece.graph) else _form(piece.graph)
        kinds.setdefault(form, []).append(index)
    segments: dict[int, Segment] = {}
    for first, *others in kinds.values():
        name, members = f"{stem}.{first:03d}.onnx", (first, *others)
        described = [describe_piece(pieces[index], name) for index in members]
        if others:
            described = _joined([pieces[index].graph for index in members], described)
            _note_names(pieces[first], [pieces[index].graph for index in others])
        segments |= zip(members, described, strict=True)
        ir.save(pieces[first], folder / name)
    return tuple(segments[index] for index in range(len(pieces)))


def names_within(model: ir.Model, output: str) -> dict[str, str]:
    """What values of a graph are called in that of its segments whose first output is `output`."""
    noted = model.metadata_props.get(f"{_NAMES}{output}")
    if noted is None:
        return {}
    return dict(zip(_made(model.graph), json.loads(noted), strict=True))


def _joined(graphs: Sequence[ir.Graph], segments: Sequence[Segment]) -> list[Segment]:
    """The first of the graphs takes what is unlike as inputs. The segments, with what they bind."""
    first = graphs[0]
    names = tuple(value.name or "" for value in (*first.inputs, *first.outputs))
    weights = [_weights(graph) for graph in graphs]
    unlike = [
        position
        for position, same in enumerate(zip(*weights, strict=True))
        if len({_place(value) for value in same}) > 1
    ]
    joined = []
    for segment, own in zip(segments, weights, strict=True):
        bound = tuple(_bound(own[at], weights[0][at].name or "") for at in unlike)
        joined.append(structs.replace(segment, weights=bound, names=names))
    for value in (weights[0][position] for position in unlike):
        del first.initializers[value.name or ""]
        value.const_value = None
        first.inputs.append(value)
    return joined


def _bound(weight: ir.Value, called: str) -> BoundWeight:
    tensor = weight.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    weight.type, weight.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
    (spec,) = tensor_specs([weight])
    return BoundWeight(spec, called, str(tensor.location), tensor.offset or 0)


def _note_names(model: ir.Model, others: Iterable[ir.Graph]) -> None:
    """So that what is calculated inside can be told apart where it is compared."""
    for graph in others:
        output = graph.outputs[0].name or ""
        model.metadata_props[f"{_NAMES}{output}"] = json.dumps([*_made(graph)])


def _made(graph: ir.Graph) -> Iterator[str]:
    return (value.name or "" for node in graph for value in node.outputs)


def _place(weight: ir.Value) -> tuple[str, int]:
    tensor = weight.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return str(tensor.location), tensor.offset or 0


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.const_value, ir.ExternalTensor)


def _weights(graph: ir.Graph) -> list[ir.Value]:
    """Those in a file, in the order of their use."""
    used = (value for node in graph for value in node.inputs if value is not None)
    return list(dict.fromkeys(value for value in used if _is_weight(value)))


def _folds(graph: ir.Graph) -> bool:
    """Whether something is made of weights alone: a library does so once, as it loads the graph."""
    return any(
        any(map(_is_weight, node.inputs))
        and all(value is None or value.const_value is not None for value in node.inputs)
        for node in graph
    )


@dataclass(slots=True)
class _Numbers:
    """Values of a graph by the order in which they are met, with what they are at first."""

    met: dict[ir.Value, int]

    def of(self, value: ir.Value | None) -> Hashable:
        if value is None:
            return None
        if value in self.met:
            return self.met[value]
        self.met[value] = len(self.met)
        return self.met[value], _content(value)


def _content(value: ir.Value) -> Hashable:
    shape = None if value.shape is None else tuple(map(str, value.shape))
    tensor = value.const_value
    if tensor is None:
        return value.dtype, shape
    held = None if isinstance(tensor, ir.ExternalTensor) else tensor.tobytes()
    return tensor.dtype, tuple(map(str, tensor.shape)), held


def _form(graph: ir.Graph) -> Hashable:
    """Equal for graphs that differ in names and in the places of weights alone."""
    numbers = _Numbers({})
    inputs = tuple(numbers.of(value) for value in graph.inputs)
    nodes = tuple(
        (
            node.domain,
            node.op_type,
            tuple(numbers.of(value) for value in node.inputs),
            tuple(sorted(_attribute(item) for item in node.attributes.values())),
            tuple(numbers.of(value) for value in node.outputs),
        )
        for node in graph
    )
    return inputs, nodes, tuple(numbers.of(value) for value in graph.outputs)


def _attribute(attribute: ir.Attr) -> bytes:
    written: bytes = ir.to_proto(attribute).SerializeToString(deterministic=True)
    return written
