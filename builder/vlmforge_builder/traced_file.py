"""A traced part as a file: its graph, with the parameters as inputs, and nothing of their values.

An engine keeps that of its decoder, so that it can be divided among ranks without its checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

from vlmforge_builder.export import Traced, attach_parameters, detach_parameters

NEUTRAL_FILE = "decoder.neutral.onnx"


def save_traced(traced: Traced, path: Path) -> None:
    """Write the graph; `traced` is left as it is."""
    model = traced.model.clone()
    detach_parameters(model.graph, traced.shapes)
    ir.save(model, path)


def load_traced(path: Path, interface: Collection[str]) -> Traced:
    """Read what `save_traced` wrote; inputs whose names are not of the `interface` are weights."""
    model = ir.load(path)
    shapes = {
        value.name or "": value.shape.numpy()
        for value in model.graph.inputs
        if value.name not in interface and value.shape is not None
    }
    attach_parameters(model.graph, shapes)
    return Traced(model, shapes)
