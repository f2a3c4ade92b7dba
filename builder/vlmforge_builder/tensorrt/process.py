"""Run the compiling process, pass on how far it is, and say what it was at if it dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from vlmforge.engine.schema import to_json
from vlmforge.env import child_environment
from vlmforge.errors import BuildError
from vlmforge_builder.tensorrt.flavours import Flavour, library_path
from vlmforge_builder.tensorrt.job import CompileRequest

_PROGRAM = "vlmforge_builder.tensorrt.compiler"
_LOG_LINES = 25


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compilation took: most memory of the process in bytes, and the library's version."""

    peak_rss_bytes: int
    version: str


@dataclass(slots=True)
class _Heard:
    """What the process said last."""

    stage: str = "start"
    phases: list[str] = field(default_factory=list)
    refused: tuple[str, str] | None = None
    compiled: Compiled | None = None


def run_compiler(
    flavour: Flavour, request: CompileRequest, report: Callable[[int, int], None]
) -> Compiled:
    """Compile `request`; `report` takes (done, total) steps.

    Raises:
        BuildError: the library refused the graph, or the process died; tells the stage, what it was
            at, and the last lines of its log.
    """
    heard = _Heard()
    beside = Path(request.graph).parent  # which can be written to, as /tmp need not be
    with (
        TemporaryDirectory(prefix="compile-", dir=beside) as scratch,
        library_path(flavour, Path(scratch)) as libraries,
    ):
        told, log = Path(scratch) / "request.json", Path(scratch) / "log"
        told.write_text(to_json(request), "utf-8")
        with log.open("wb") as errors:
            command = [sys.executable, "-m", _PROGRAM, str(told)]
            with subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end ends the child: see vlmforge.engine.lifeline
                stdout=subprocess.PIPE,
                stderr=errors,
                env=child_environment(libraries),
                encoding="utf-8",
                errors="replace",
            ) as process:
                try:
                    _listen(process, heard, report)
                finally:
                    process.kill()
        words = log.read_text("utf-8", errors="replace").splitlines()
    # Once it has said so the plan is whole, whatever the library does to the process at its end.
    if heard.compiled is not None:
        return heard.compiled
    raise _failure(flavour, request, heard, process.returncode, words)


def _listen(
    process: subprocess.Popen[str], heard: _Heard, report: Callable[[int, int], None]
) -> None:
    for event in _events(process):
        match event.get("event"):
            case "stage":
                heard.stage = str(event["stage"])
            case "phase":
                heard.phases.append(str(event["phase"]))
            case "step":
                report(int(str(event["done"])), int(str(event["total"])))
            case "refused":
                heard.refused = str(event["stage"]), str(event["reason"])
            case "done":
                heard.compiled = Compiled(int(str(event["peak_rss_bytes"])), str(event["version"]))
    process.wait()


def _events(process: subprocess.Popen[str]) -> Iterator[dict[str, object]]:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the library prints to standard output too
        if isinstance(event, dict):
            yield event


def _failure(
    flavour: Flavour, request: CompileRequest, heard: _Heard, status: int, words: list[str]
) -> BuildError:
    part = Path(request.graph).stem
    log = "\n    ".join(["", *words[-_LOG_LINES:]]) if words else " nothing"
    if heard.refused is not None:
        stage, reason = heard.refused
        return BuildError(
            f"{flavour.name} refused the part {part!r} ({stage}).",
            found=reason,
            expected="a graph that the library compiles",
            fix=f"try --attention native (or plugin) or another --dtype; the log's end:{log}",
        )
    last = heard.phases[-1] if heard.phases else "none"
    killed = status == -signal.SIGKILL
    return BuildError(
        f"The process that compiles the part {part!r} with {flavour.name} died.",
        found=f"{_ending(status)} in stage {heard.stage!r}, last phase {last!r}; log:{log}",
        expected="exit status 0",
        fix="free memory (a build needs about four times the weights), or build a smaller dtype"
        if killed
        else "try --attention native; if that works, report the graph with this log",
    )


def _ending(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
