"""Traces kept for a run: parts of the same modules are traced once, whoever builds them.

An engine of a tiny checkpoint is three quarters tracing, and the suite builds the same checkpoints
in many dtypes, for several targets. What is kept is the graph as `export.trace` gave it; a part is
known by all that its module is made of. Nothing is kept from one run to the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import onnx
import onnx_ir as ir
import torch._export.utils
from filelock import FileLock
from torch.onnx._internal.exporter._registration import ONNXRegistry

from vlmforge_builder import build, export
from vlmforge_builder.recipe import PartSpec

Trace = Callable[[PartSpec], export.Traced]


def identity(part: PartSpec) -> str | None:
    """All that its graph depends on, as text; None if it is made in a way that does not tell."""
    made = part.module
    if not isinstance(made, partial):
        return None
    function = f"{made.func.__module__}.{made.func.__qualname__}"
    text = repr((function, made.args, sorted(made.keywords.items()), part.interface))
    # An address, or an array that is cut short, would say less than what is there.
    return None if " at 0x" in text or "..." in text else text


def stored(traced: export.Traced, path: Path) -> None:
    """Write the graph, with its parameters as inputs, and their shapes beside it."""
    model = traced.model.clone()
    export.detach_parameters(model.graph, traced.shapes)
    path.with_suffix(".onnx").write_bytes(ir.to_proto(model).SerializeToString())
    path.write_text(json.dumps(traced.shapes), "utf-8")


def loaded(path: Path) -> export.Traced:
    model = ir.from_proto(onnx.load_model_from_string(path.with_suffix(".onnx").read_bytes()))
    shapes = {name: tuple(shape) for name, shape in json.loads(path.read_text("utf-8")).items()}
    export.attach_parameters(model.graph, shapes)
    return export.Traced(model, shapes)


def remembering(trace: Trace, folder: Path) -> Trace:
    """`trace`, but for parts that were traced before by any process that shares the folder."""
    folder.mkdir(exist_ok=True)

    def remembered(part: PartSpec) -> export.Traced:
        known = identity(part)
        if known is None:
            return trace(part)
        path = folder / f"{hashlib.sha256(known.encode()).hexdigest()}.json"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                stored(trace(part), path)
        traced = loaded(path)
        export._check_names(part, traced.shapes)
        return traced

    return remembered


def remember_traces(folder: Path) -> None:
    """Every build of this process keeps its traces in `folder`; once is enough."""
    if build.trace is export.trace:
        build.trace = remembering(export.trace, folder)
        # The exporter makes its tables of operators anew for each export, a fifth of the time.
        ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))
        found = cache(torch._export.utils._collect_all_valid_cia_ops)
        torch._export.utils._collect_all_valid_cia_ops = lambda: set(found())
