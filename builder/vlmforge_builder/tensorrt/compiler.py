"""The compiling process: parses one graph, compiles it and writes its plan.

    python -m vlmforge_builder.tensorrt.compiler REQUEST.json

It is a process of its own because the libraries may end it: several graphs crash them. What it does
is told on standard output, one JSON object a line; the library's own words go to standard error.
"""

from __future__ import annotations

import importlib
import json
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmforge.engine.layer_report import Layer, LayerOutput, LayerReport
from vlmforge.engine.lifeline import end_with_parent
from vlmforge.engine.schema import from_json, to_json
from vlmforge_builder.tensorrt.job import CompileRequest
from vlmforge_plugins.cached_attention.compile import Compiler, Nvcc, Nvrtc, compile_set
from vlmforge_plugins.cached_attention.config import Config
from vlmforge_plugins.cached_attention.plugin import register
from vlmforge_plugins.errors import CompileError, PluginError


def main(argv: list[str]) -> int:
    """Compile the request in the file `argv[0]`; 1 when the library refuses the graph."""
    # Not SIGTERM: there is nothing to clear up, and the library may hold it back for minutes.
    end_with_parent(signal.SIGKILL)
    request = from_json(CompileRequest, json.loads(Path(argv[0]).read_text("utf-8")), argv[0])
    module = importlib.import_module(request.module)
    try:
        _compile(module, request)
    except _RefusedError as refused:
        tell(event="refused", stage=refused.stage, reason=refused.reason)
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tell(event="done", peak_rss_bytes=peak, version=module.__version__)
    return 0


def tell(**event: object) -> None:
    """Say something to the parent."""
    print(json.dumps(event), flush=True)


class _RefusedError(Exception):
    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage, self.reason = stage, reason


def _compile(trt: Any, request: CompileRequest) -> None:
    logger = _logger(trt)
    kept = _register(trt, request)
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    tell(event="stage", stage="parse")
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.graph):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise _RefusedError("parse", "; ".join(errors) or "no reason given")
    report = LayerReport(tuple(_layers(network)))
    Path(request.layers).write_text(to_json(report), "utf-8")
    config = _configure(trt, builder, network, request)
    tell(event="stage", stage="compile")
    with Path(request.plan).open("wb") as file:
        if not _build(trt, builder, network, config, file):
            raise _RefusedError("compile", "; ".join(logger.errors[-3:]) or "no reason given")
    del kept


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Errors are kept for the report; all is passed on."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            if severity <= trt.ILogger.Severity.WARNING:
                print(f"{severity.name}: {message}", file=sys.stderr, flush=True)

    return Logger()


def _register(trt: Any, request: CompileRequest) -> object:
    """The plugin's creators, which must live as long as the network."""
    if request.kernels is None:
        return None
    tell(event="stage", stage="kernels")
    wanted = request.kernels
    config = Config(wanted.head_size, wanted.activation, wanted.stored)  # type: ignore[arg-type]
    try:
        binaries = compile_set(config, _compiler(), Path(request.cache))
    except PluginError as error:
        raise _RefusedError("kernels", str(error)) from error
    return register(trt, {config: binaries})


def _compiler() -> Compiler:
    """NVRTC, which needs no toolkit, or else the toolkit's compiler."""
    try:
        return Nvrtc()
    except CompileError:
        return Nvcc()


def _configure(trt: Any, builder: Any, network: Any, request: CompileRequest) -> Any:
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt)
    if request.kernels is not None:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if request.capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, request.capability), 0)
    for ranges in request.profiles:
        profile = builder.create_optimization_profile()
        for tensor in (network.get_input(i) for i in range(network.num_inputs)):
            if -1 in tuple(tensor.shape):
                dims = [
                    (size,) * 3 if size != -1 else ranges[tensor.get_dimension_name(axis)]
                    for axis, size in enumerate(tensor.shape)
                ]
                profile.set_shape(tensor.name, *zip(*dims, strict=True))
        config.add_optimization_profile(profile)
    return config


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells of each phase of the library's work, and how far the outermost has come."""

        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            tell(event="phase", phase=phase, parent=parent)

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == next(iter(self._steps), None):
                tell(event="step", done=step + 1, total=self._steps[phase])
            return True

    return Monitor()


def _build(trt: Any, builder: Any, network: Any, config: Any, file: Any) -> bool:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Takes the plan piece by piece, so that it is never whole in memory."""

        def __init__(self) -> None:
            super().__init__()
            self.written = 0

        def write(self, data: bytes) -> int:
            self.written += len(data)
            return int(file.write(data))

    writer = Writer()
    done = builder.build_serialized_network_to_stream(network, config, writer)
    return bool(done) and writer.written > 0


def _layers(network: Any) -> Iterator[Layer]:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = (layer.get_output(i) for i in range(layer.num_outputs))
        described = (
            LayerOutput(out.name, out.dtype.name, tuple(out.shape)) for out in outputs if out
        )
        inputs = (layer.get_input(i) for i in range(layer.num_inputs))
        names = tuple(value.name for value in inputs if value)
        yield Layer(layer.name, layer.type.name, names, tuple(described))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
