"""`build-engine`: the way in, and every way out of it.

Nothing is imported here that takes time: an interrupt is to be understood from the first moment.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

_INTERRUPTED = "build-engine: interrupted; nothing was published"
_LIBRARIES = (
    *("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "sentencepiece"),
    *("huggingface_hub", "google"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `build-engine`; returns the exit status.

    0; 1 on an error; 130 and 143 when SIGINT and SIGTERM ended it; 141 when nobody reads any more.
    """
    try:
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, _end_at_once)
        return _run(argv)
    except KeyboardInterrupt as interrupt:
        _last_words(_INTERRUPTED)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except BrokenPipeError:
        _leave_pipes()
        return 128 + signal.SIGPIPE


def _run(argv: Sequence[str] | None) -> int:
    from vlmforge.errors import BuildError, VlmforgeError

    try:
        from vlmforge_builder.command import run

        run(argv)
    except VlmforgeError as error:
        return _failed(error)
    except ModuleNotFoundError as error:
        # The command is there wherever the runtime is, and what it needs is an extra.
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        missing = BuildError(
            "Building needs libraries that are not installed here.",
            found=f"no module {error.name}",
            expected="the extra `build`",
            fix="pip install 'vlmforge[build]'",
        )
        return _failed(missing)
    return 0


def _failed(error: Exception) -> int:
    _last_words(f"build-engine: {type(error).__name__}: {error}")
    return 1


def _end_at_once(signum: int, frame: object) -> None:
    """While nothing has been made that must be cleared up: an import cannot lose this."""
    del frame
    # Not print(): it cannot be entered again from within itself.
    with suppress(OSError):
        os.write(2, f"{_INTERRUPTED}\n".encode())
    os._exit(128 + signum)


def _last_words(text: str) -> None:
    try:
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)
    except OSError:
        _leave_pipes()


def _leave_pipes() -> None:
    """Python flushes at its end: into nothing, rather than into a pipe that nobody reads."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nothing, descriptor)
