"""Engines of TensorRT-RTX whose plans are for the library's stand-in, `backends.fake_plans`.

Built as any engine is; only the process that compiles a graph is replaced by one that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from conftest import DATA, build_once, kernels_for_one_gpu
from vlmforge.backends.fake_plans import VERSION, written_plan
from vlmforge.engine.layer_report import Layer, LayerReport
from vlmforge.engine.schema import to_json
from vlmforge_builder import plan_files
from vlmforge_builder.ops import DOMAIN, functions
from vlmforge_builder.ops import VERSION as OPS_VERSION
from vlmforge_builder.tensorrt.flavours import Flavour
from vlmforge_builder.tensorrt.job import CompileRequest
from vlmforge_builder.tensorrt.process import Compiled


def keep_graph(
    flavour: Flavour, request: CompileRequest, report: Callable[[int, int], None]
) -> Compiled:
    """In the place of `run_compiler`: the plan is the graph, with its ops' function bodies.

    Layers are called by their ops.
    """
    del flavour
    model = ir.from_proto(onnx.load(request.graph))  # its weights too
    nodes = [(node.name or "", node.op_type) for node in model.graph]
    ops = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for function in functions() if ops else ():
        model.functions[function.identifier()] = function
    if ops:
        model.opset_imports[DOMAIN] = OPS_VERSION
    profiles = [{n: (r[0], r[2]) for n, r in ranges.items()} for ranges in request.profiles]
    graph = ir.to_proto(model).SerializeToString()
    Path(request.plan).write_bytes(written_plan(graph, profiles))
    layers = tuple(Layer(name, kind, (), ()) for name, kind in nodes)
    Path(request.layers).write_text(to_json(LayerReport(layers)), "utf-8")
    report(1, 1)
    return Compiled(0, VERSION)


def plan_engine(shared: Path, name: str, *more: str) -> Path:
    """The float16 engine of a golden checkpoint for `plans_on_cpu`, built once for a run."""
    options = ("--target", "tensorrt_rtx", "--dtype", "float16", "--max-batch-size", "4", *more)
    kind = ".".join(["plans", *(option for option in more if not option.startswith("--"))])
    with pytest.MonkeyPatch.context() as patch, kernels_for_one_gpu():
        patch.setattr(plan_files, "run_compiler", keep_graph)
        return build_once(shared / f"{name}.{kind}.engine", DATA / name / "checkpoint", *options)
