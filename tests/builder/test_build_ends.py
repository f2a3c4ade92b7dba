"""Builds that end before their end: interrupted, or killed, whatever they were about to do."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import HANGS
from vlmforge.engine.bundle import open_bundle
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress
from vlmforge_recipes.llava.synthetic import PRESETS, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", PRESETS["tiny"])


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".building-" in path.name]


def start(
    checkpoint: Path, engine: Path, stage: str, *, program: str = "-mvlmforge_builder"
) -> subprocess.Popen[str]:
    """A build in a process of its own that has begun `stage`."""
    child = subprocess.Popen(
        [sys.executable, program, checkpoint, "-o", engine],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    lines = []
    for line in child.stderr:
        lines.append(line)
        if line.rstrip().endswith(f"] {stage}"):
            return child
    raise AssertionError("".join(lines))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_build_leaves_nothing(
    checkpoint: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    child = start(checkpoint, tmp_path / "it.engine", "trace vision")
    assert len(leftovers(tmp_path)) == 1
    child.send_signal(sent)
    _, said = child.communicate(timeout=HANGS)
    # Python ends by the signal where it struck in code that a library ran from C, although it was
    # handled since; a shell says 130 of both.
    assert child.returncode in (128 + sent, -signal.SIGINT)
    assert said.rstrip().endswith("build-engine: interrupted; nothing was published")
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


LOSING = """
import os, signal, sys
from vlmforge_builder import build, cli

def trace(part, traced=build.trace):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 5)
    except KeyboardInterrupt:
        print("lost", file=sys.stderr)
    return traced(part)

build.trace = trace
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("traces_for_children")
def test_an_interrupt_that_a_library_loses_ends_the_build_all_the_same(
    checkpoint: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", LOSING, checkpoint, "-o", tmp_path / "it.engine"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=HANGS, check=False)
    assert done.stderr.count("lost") == 1  # it did not go on to the second part
    assert done.stderr.rstrip().endswith("build-engine: interrupted; nothing was published")
    assert done.returncode == 130
    assert list(tmp_path.iterdir()) == []


# Its second part takes for ever.
STUCK = """
import sys, threading
from vlmforge_builder import build, cli

def trace(part, traced=build.trace):
    return traced(part) if part.name == "vision" else threading.Event().wait()

build.trace = trace
sys.exit(cli.main())
"""


@pytest.mark.usefixtures("traces_for_children")
def test_a_killed_build_leaves_no_engine_and_the_next_sweeps(
    checkpoint: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "it.engine"
    child = start(checkpoint, engine, "trace decoder", program=f"-c{STUCK}")
    child.kill()
    child.communicate(timeout=HANGS)
    assert len(leftovers(tmp_path)) == 1
    assert not engine.exists()
    other = tmp_path / ".other.engine.building-1"
    other.mkdir()
    with Progress(text=io.StringIO()) as progress:
        build_engine(BuildOptions(str(checkpoint), engine), progress)
    open_bundle(engine)
    assert leftovers(tmp_path) == [other.name]
