"""Trace a part on fake tensors into an ONNX graph whose weights are references, never values."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from vlmforge.errors import BuildError
from vlmforge_builder.onnx_file import unread
from vlmforge_builder.recipe import PartSpec, TensorArg, parameters
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
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet(), _uncollected():
        module = part.module().eval()
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
    _detach_parameters(model.graph, shapes)
    onnxscript.optimizer.optimize_ir(model)
    _attach_parameters(model.graph, shapes)
    _name_interface(model.graph, part)
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

    def fake(arg: TensorArg) -> torch.Tensor:
        dtype = torch.int64 if arg.dtype == "int64" else DTYPES[arg.dtype]
        shape = [d if isinstance(d, int) else dimension(d) for d in arg.shape]
        return torch.zeros(shape, dtype=dtype)

    def dynamic(arg: TensorArg) -> dict[int, Dim]:
        return {i: dims[d] for i, d in enumerate(arg.shape) if isinstance(d, str)}

    arguments = tuple(
        [fake(a) for a in arg] if isinstance(arg, tuple) else fake(arg) for arg in part.inputs
    )
    shapes = tuple(
        [dynamic(a) for a in arg] if isinstance(arg, tuple) else dynamic(arg) for arg in part.inputs
    )
    return arguments, shapes


def _detach_parameters(graph: ir.Graph, shapes: dict[str, tuple[int, ...]]) -> None:
    """Make parameters graph inputs for a while, so that no optimisation asks for their values."""
    for name in shapes:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)


def _attach_parameters(graph: ir.Graph, shapes: dict[str, tuple[int, ...]]) -> None:
    kept = [value for value in graph.inputs if value.name not in shapes]
    weights = [value for value in graph.inputs if value.name in shapes]
    graph.inputs[:] = kept
    for value in weights:
        if not value.uses():
            raise BuildError(f"The parameter {value.name} is not used by the exported graph.")
        value.const_value = unread(ir.DataType.FLOAT, ir.Shape(shapes[value.name or ""]))
        graph.register_initializer(value)


def _name_interface(graph: ir.Graph, part: PartSpec) -> None:
    flat = [a for arg in part.inputs for a in (arg if isinstance(arg, tuple) else (arg,))]
    for value, arg in zip(graph.inputs, flat, strict=True):
        value.name = arg.name
    for value, name in zip(graph.outputs, part.outputs, strict=True):
        value.name = name


def _strip(model: ir.Model) -> None:
    """Drop what differs between two exports or tells of the builder's machine."""
    model.producer_name, model.producer_version = "vlmforge", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "main"
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
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
