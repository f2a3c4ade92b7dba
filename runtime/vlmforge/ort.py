"""ONNX Runtime with its telemetry off: `from vlmforge.ort import ort` is how all import it.

Since 1.32 the library collects events as soon as it is imported: it leaves a device id and an event
queue in HOME and sends them to its maker. Its own switch is read once, at the import, which is why
nobody else may import it; `disable_telemetry_events()` alone comes too late.
Source: `Privacy.md` of the onnxruntime package.
"""

from __future__ import annotations

import logging
import sys

from vlmforge import env
from vlmforge.errors import EngineError

__all__ = ["ort", "run_bound"]


def _switch_off() -> None:
    turned = env.refuse_telemetry()
    if "onnxruntime" in sys.modules and "ORT_DISABLE_TELEMETRY" in turned:
        logging.getLogger("vlmforge").warning(
            "onnxruntime was imported before vlmforge could switch its telemetry off, and may have "
            "written to HOME; import vlmforge.ort first, or set ORT_DISABLE_TELEMETRY=1"
        )


_switch_off()

import onnxruntime as ort  # noqa: E402 (the switch is read by this import)

if not env.telemetry_allowed():
    ort.disable_telemetry_events()


def run_bound(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    """Run a graph of a decoder (EngineError: the library failed)."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise EngineError(
            "ONNX Runtime failed to run the decoder.",
            found=str(error).strip().splitlines()[0],
            expected="a step that ends",
            fix="vlmforge verify ENGINE; if it fails too, rebuild the engine",
        ) from error
