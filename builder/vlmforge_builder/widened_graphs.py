"""Graphs of 16 bits opened in float32, for processors: weights are widened where they are used.

So a processor tells what a GPU is to give, bfloat16 too, which ONNX Runtime's CPU provider lacks,
in little memory: files are mapped, and one weight is float32 at a time.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from vlmforge.errors import EngineError
from vlmforge.ort import ort

WIDENED = "_widened"
"""Ends the name of a weight in float32."""
_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_FLOAT = ir.DataType.FLOAT
_FOLDER = "session.model_external_initializers_file_folder_path"


def open_widened(file: Path) -> ort.InferenceSession:
    """A session of the graph in `file`, all of whose float values are float32.

    Raises:
        EngineError: it cannot be loaded.
    """
    model = ir.load(file)
    widen(model)
    return session_of(ir.to_proto(model).SerializeToString(), file)


def session_of(data: bytes, file: Path) -> ort.InferenceSession:
    """A session of a changed graph whose weights are where those of `file` are.

    Raises:
        EngineError: it cannot be loaded.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Casts of weights are not to be folded: all of them would be float32 at once.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(_FOLDER, str(file.parent))
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot load {file} in float32.",
            found=(str(error).strip().splitlines() or [type(error).__name__])[0][:300],
            expected="a graph as build-engine wrote it",
            fix="build-engine --skip-goldens leaves out what needs it",
        ) from error


def widen(model: ir.Model) -> None:
    """Make every 16-bit float of a graph a float32; initialisers stay, with casts after them."""
    graph = model.graph
    for weight in tuple(graph.initializers.values()):
        if weight.dtype in _NARROW:
            _cast(graph, weight)
    made = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *made):
        if value.dtype in _NARROW:
            value.type = ir.TensorType(_FLOAT)
    for node in graph:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and ir.DataType(to.as_int()) in _NARROW:
            node.attributes["to"] = ir.AttrInt64("to", _FLOAT)


def _cast(graph: ir.Graph, weight: ir.Value) -> None:
    name = f"{weight.name}{WIDENED}"
    node = ir.node("Cast", [weight], attributes={"to": _FLOAT}, name=name)
    wide = node.outputs[0]
    wide.name, wide.shape, wide.type = name, weight.shape, ir.TensorType(_FLOAT)
    weight.replace_all_uses_with(wide)
    node.replace_input_with(0, weight)
    graph.insert_before(graph[0], node)
