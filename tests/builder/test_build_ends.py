"""Builds that end before their end: interrupted, or killed, whatever they were about to do."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

import pytest

from conftest import HANGS, HF
from vlmforge.engine.bundle import open_bundle
from vlmforge_builder import build, cli, export
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress
from vlmforge_builder.recipe import PartSpec

CHECKPOINT, WINDOW = HF / "checkpoint", 1024  # as other tests build it: its traces are kept


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".building-" in path.name]


Trace = Callable[[PartSpec], export.Traced]


def read_until(stage: str, said: TextIO) -> None:
    """Until the build has begun `stage`."""
    lines = []
    for line in said:
        lines.append(line)
        if line.rstrip().endswith(f"] {stage}"):
            return
    raise AssertionError("".join(lines))


@dataclass(frozen=True)
class Child:
    """A build in a process of its own, and what it says."""

    number: int
    said: TextIO

    def end(self, sent: signal.Signals | None = None) -> tuple[int, str]:
        """Its status, as `subprocess` has it, and what it said to its end."""
        if sent is not None:
            os.kill(self.number, sent)
        with self.said:
            rest = self.said.read()
        _, status = os.waitpid(self.number, 0)
        return os.waitstatus_to_exitcode(status), rest


def forked(engine: Path, trace: Trace) -> Child:
    """`build-engine` whose parts are traced by `trace`.

    A fork of this process, which has imported what takes a command longer than all else here.
    """
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        os.dup2(writer, 2)
        _build([str(CHECKPOINT), "-o", str(engine), "--session-len", str(WINDOW)], trace)
    os.close(writer)
    return Child(number, os.fdopen(reader, encoding="utf-8"))


def _build(arguments: list[str], trace: Trace) -> NoReturn:
    """In the child: nothing of the tests may run after it, whatever happens."""
    status = 99
    signal.alarm(int(HANGS))  # whatever becomes of the parent
    with os.fdopen(2, "w", encoding="utf-8") as sys.stderr:  # not what pytest reads
        try:
            build.trace = trace
            status = cli.main(arguments)
        except BaseException:  # noqa: BLE001 - all ends here
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)


@pytest.mark.usefixtures("builds_that_stand_still")
def test_a_terminated_build_leaves_nothing(tmp_path: Path) -> None:
    """By the command itself, with all that it imports."""
    command = [sys.executable, "-m", "vlmforge_builder", CHECKPOINT, "-o", tmp_path / "it.engine"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    read_until("trace vision", child.stderr)
    assert len(leftovers(tmp_path)) == 1
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=HANGS)
    # Python ends by the signal where it struck in code that a library ran from C, although it was
    # handled since; a shell says 130 of both.
    assert child.returncode in (128 + signal.SIGTERM, -signal.SIGINT)
    check_nothing_is_left(said, tmp_path)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def for_ever(part: PartSpec) -> export.Traced:
        traced = export.trace(part)  # where it strikes, as a rule
        threading.Event().wait()
        return traced

    child = forked(tmp_path / "it.engine", for_ever)
    read_until("trace vision", child.said)
    assert len(leftovers(tmp_path)) == 1
    status, said = child.end(signal.SIGINT)
    assert status == 128 + signal.SIGINT
    check_nothing_is_left(said, tmp_path)


def check_nothing_is_left(said: str, folder: Path) -> None:
    assert said.rstrip().endswith("build-engine: interrupted; nothing was published")
    assert "Traceback" not in said
    assert list(folder.iterdir()) == []


def test_an_interrupt_that_a_library_loses_ends_the_build_all_the_same(
    tmp_path: Path,
) -> None:
    kept = build.trace

    def losing(part: PartSpec) -> export.Traced:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 5)
        except KeyboardInterrupt:
            print("lost", file=sys.stderr)
        return kept(part)

    status, said = forked(tmp_path / "it.engine", losing).end()
    assert said.count("lost") == 1  # it did not go on to the second part
    assert status == 128 + signal.SIGINT
    check_nothing_is_left(said, tmp_path)


def test_a_killed_build_leaves_no_engine_and_the_next_sweeps(
    tmp_path: Path,
) -> None:
    kept, engine = build.trace, tmp_path / "it.engine"

    def stuck(part: PartSpec) -> export.Traced:
        if part.name == "decoder":
            threading.Event().wait()
        return kept(part)

    child = forked(engine, stuck)
    read_until("trace decoder", child.said)
    assert child.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    assert not engine.exists()
    other = tmp_path / ".other.engine.building-1"
    other.mkdir()
    with Progress(text=io.StringIO()) as progress:
        build_engine(BuildOptions(str(CHECKPOINT), engine, session_len=WINDOW), progress)
    open_bundle(engine)
    assert leftovers(tmp_path) == [other.name]
