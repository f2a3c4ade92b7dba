"""Trace a part on fake tensors into an ONNX graph whose weights are references, never values."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import BuildError
from vlmforge_builder.onnx_file import check_interface, unread
from vlmforge_builder.recipe import PartSpec, parameters
from vlmforge_builder.weights import DTYPES

OPSET = 23  # the first with RMSNormalization and Attention
# Example sizes of symbolic dimensions: distinct, so that tracing cannot take two for the same.
_EXAMPLES = (2, 3, 5, 7, 11, 13)


@dataclass(frozen=True, slots=True)
class Traced:
    """A graph whose parameters are initialisers without values, and the parameters' shapes."""

    model: ir.Model
    shapes: dict[str, tuple[int, ...]]


def trace(part: PartSpec) -> Traced:
    """Export the module of `part`; memory stays small whatever the weights' size.

    Raises:
        BuildError: a parameter has no weight, a weight has no parameter, or the exporter failed.
    """
    with _uncached(), FakeTensorMode(allow_non_fake_inputs=True), _quiet(), _uncollected():
        module = part.module().eval().requires_grad_(requires_grad=False)
        shapes = {name: tuple(p.shape) for name, p in parameters(module).items()}
        _check_names(part, shapes)
        arguments, dynamic = _example(part)
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise BuildError(f"The exporter returned no graph for the part {part.name!r}.")
    model = program.model
    detach_parameters(model.graph, shapes)
    onnxscript.optimizer.optimize_ir(model)
    attach_parameters(model.graph, shapes)
    _name_interface(model.graph, part)
    _read_sizes_first(model.graph)
    _strip(model)
    return Traced(model, shapes)


def _check_names(part: PartSpec, shapes: dict[str, tuple[int, ...]]) -> None:
    if odd := sorted(set(shapes) ^ set(part.weights)):
        raise BuildError(
            f"The weights of the part {part.name!r} do not match its module.",
            found=f"{len(odd)} names on one side only, such as {', '.join(odd[:3])}",
            expected="one weight for each parameter",
            fix="correct the recipe's table of weights",
        )


def _example(part: PartSpec) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Fake arguments and the dynamic-shape description that torch.export takes."""
    sizes: dict[str, int] = {}
    dims: dict[str, Dim] = {}

    def dimension(name: str) -> int:
        if name not in sizes:
            sizes[name], dims[name] = _EXAMPLES[len(sizes)], Dim(name)
        return sizes[name]

    def fake(spec: TensorSpec) -> torch.Tensor:
        dtype = torch.int64 if spec.dtype == "int64" else DTYPES[spec.dtype]
        shape = [d if isinstance(d, int) else dimension(d) for d in spec.shape]
        return torch.zeros(shape, dtype=dtype)

    def dynamic(spec: TensorSpec) -> dict[int, Dim]:
        return {i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)}

    by_name = groupby(part.interface.inputs, lambda spec: spec.name.partition(".")[:2])
    groups = [(dot, tuple(specs)) for (_, dot), specs in by_name]
    arguments = tuple([fake(s) for s in specs] if dot else fake(*specs) for dot, specs in groups)
    shapes = tuple([dynamic(s) for s in specs] if dot else dynamic(*specs) for dot, specs in groups)
    return arguments, shapes


def detach_parameters(graph: ir.Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make parameters graph inputs for a while, so that nobody asks for their values."""
    for name in shapes:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)


def attach_parameters(graph: ir.Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make those inputs of a graph initialisers whose values are nowhere yet.

    Raises:
        BuildError: one is not used.
    """
    kept = [value for value in graph.inputs if value.name not in shapes]
    weights = [value for value in graph.inputs if value.name in shapes]
    graph.inputs[:] = kept
    for value in weights:
        if not value.uses():
            raise BuildError(f"The parameter {value.name} is not used by the exported graph.")
        value.const_value = unread(ir.DataType.FLOAT, ir.Shape(shapes[value.name or ""]))
        graph.register_initializer(value)


def _name_interface(graph: ir.Graph, part: PartSpec) -> None:
    for values, specs in (
        (graph.inputs, part.interface.inputs),
        (graph.outputs, part.interface.outputs),
    ):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
    check_interface(graph, part.interface)


def _read_sizes_first(graph: ir.Graph) -> None:
    """Read each size off the first input that has it.

    The exporter takes any, such as a cache for the number of sequences, and targets replace caches.
    """
    for node in graph:
        value = node.inputs[0] if node.op_type == "Shape" else None
        if value is None or not value.is_graph_input() or value.shape is None:
            continue
        start = node.attributes.get_int("start", 0)
        if node.attributes.get_int("end", len(value.shape)) != start + 1:
            continue
        places = (
            (v, at)
            for v in graph.inputs
            for at, size in enumerate(v.shape or ())
            if size == value.shape[start]
        )
        first, at = next(places)
        node.replace_input_with(0, first)
        node.attributes["start"] = ir.AttrInt64("start", at)
        node.attributes["end"] = ir.AttrInt64("end", at + 1)


def _strip(model: ir.Model) -> None:
    """Drop what differs between two exports or tells of the builder's machine."""
    model.producer_name, model.producer_version = "vlmforge", None
    model.metadata_props.clear()
    model.graph.name = "main"
    ClearMetadataAndDocStringPass()(model)
    made = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *made):
        value.metadata_props.clear()


@contextmanager
def _uncollected() -> Iterator[None]:
    """The exporter's objects live until its end: looking for garbage is a tenth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _uncached() -> AbstractContextManager[None]:
    """Fake tensors do not remember results: with symbolic sizes, looking them up takes longer."""
    patch: AbstractContextManager[None] = torch._dynamo.config.patch(
        fake_tensor_cache_enabled=False
    )
    return patch


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about features that are not used here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
