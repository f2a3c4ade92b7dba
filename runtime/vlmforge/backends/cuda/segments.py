"""Graphs in ONNX Runtime with every tensor bound by its address, on whatever device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from vlmforge.backends.cuda.device import Segment, Tensor, Work
from vlmforge.errors import EngineError
from vlmforge.ort import ort

# Of TensorProto.DataType in onnx.proto3: numpy has no name for all of them.
_ELEMENTS = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "float16": 10,
    "float64": 11,
    "bfloat16": 16,
}


class OrtSegment(Segment):
    """See `Segment`. `owner` is kept as long as the session: the stream is its.

    Tensors are of the device `number` of its kind.
    """

    def __init__(
        self, session: ort.InferenceSession, kind: str, owner: object, number: int = 0
    ) -> None:
        self._session, self._kind, self._number = session, kind, number
        self._run_options = ort.RunOptions()
        # Nobody waits for the device here: what is read is read from the same stream.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # The library's Python looks for it at each run, and where it is not there raises an error
        # inside, which takes 15 times as long as the run itself. -1: it is to capture nothing.
        self._run_options.add_run_config_entry("gpu_graph_id", "-1")
        self._owner = owner

    @override
    def bind(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Work:
        binding, given = self._session.io_binding(), [t for t in inputs if not t.weight]
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for item in tensors:
                element = _ELEMENTS[item.dtype]
                name, number = item.in_graph, self._number
                bind(name, self._kind, number, element, item.shape, item.address)

        def work() -> None:
            try:
                self._session.run_with_iobinding(binding, self._run_options)
            except Exception as error:
                raise EngineError(
                    "ONNX Runtime failed to run a segment of the decoder.",
                    found=first_line(error),
                    expected=f"a step of {', '.join(f'{t.name} {t.shape}' for t in given)}",
                    fix="vlmforge doctor; if all is well there, rebuild the engine",
                ) from error

        return work


def open_session(
    file: Path, providers: Sequence[str | tuple[str, dict[str, str]]], options: ort.SessionOptions
) -> ort.InferenceSession:
    """Load a graph for the first of `providers` (EngineError: it cannot be, or not there)."""
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(file, options, providers=list(providers))
    except Exception as error:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot load {file}.",
            found=first_line(error),
            expected="a graph as build-engine wrote it, and memory for its weights",
            fix="vlmforge doctor, then rebuild: build-engine CHECKPOINT -o ENGINE --force",
        ) from error
    session.disable_fallback()
    return session


def first_line(error: BaseException) -> str:
    """What a library said first, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
