"""How the commands end: interrupted at any moment, unread, or with nobody to talk to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import DATA

CHECKPOINT = DATA / "yi_vl" / "checkpoint"
# Interrupts itself when it is about to import `sys.argv[1]`, which must be still to come.
INTERRUPTED = """
import os, sys, time
name, signum, program = sys.argv[1:4]
assert name not in sys.modules
class Strike:
    def find_spec(self, wanted, *_):
        if wanted == name:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(signum))
sys.meta_path.insert(0, Strike())
sys.argv[1:] = sys.argv[4:]
if program == "vlmforge":
    from vlmforge.cli import main
else:
    from vlmforge_builder.cli import main
assert name not in sys.modules
sys.exit(main())
"""


def interrupted(module: str, sent: signal.Signals, *command: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, str(int(sent)), *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "module", ["vlmforge.errors", "vlmforge_builder.command", "argparse", "torch"]
)
def test_a_build_that_is_interrupted_while_it_imports(
    tmp_path: Path, module: str, sent: signal.Signals
) -> None:
    status, said = interrupted(module, sent, "build-engine", CHECKPOINT, "-o", tmp_path / "e")
    assert said == "build-engine: interrupted; nothing was published\n"
    assert status == 128 + sent
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["argparse", "vlmforge.errors", "vlmforge.engine.families"])
def test_the_other_command_too(module: str) -> None:
    assert interrupted(module, signal.SIGINT, "vlmforge", "models") == (130, "")


def test_nobody_reads_on() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "vlmforge.cli", "models"],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_nobody_reads_why_a_build_failed(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vlmforge_builder", tmp_path, "-o", tmp_path / "e"]
    with os.fdopen(writer, "w") as err:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=err, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_letters(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlmforge.cli", "doctor"],
        env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert b"ready: onnxruntime" in done.stdout
    assert done.returncode == 0


def test_the_error_is_an_event_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT9"]}', "utf-8")
    command = [sys.executable, "-m", "vlmforge_builder", tmp_path, "-o", tmp_path / "e"]
    done = subprocess.run(
        [*command, "--json-events", "-"], capture_output=True, text=True, check=False
    )
    event = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1
    assert event["event"] == "error"
    assert event["error"] == "UnsupportedModelError"
    for part in ("summary", "found", "expected", "fix"):
        assert event[part]
        assert event[part] in done.stderr


def test_until_eof_without_an_input(tmp_path: Path) -> None:
    program = "import os, sys; os.close(0); from vlmforge_builder.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, tmp_path, "-o", tmp_path / "e", "--until-eof"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--until-eof needs a standard input" in done.stderr


def test_until_eof_ends(tmp_path: Path) -> None:
    """With the input closed from the start: before anything is read."""
    command = [sys.executable, "-m", "vlmforge_builder", CHECKPOINT, "-o", tmp_path / "e"]
    done = subprocess.run(
        [*command, "--until-eof"], input="", capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "build-engine: interrupted; nothing was published\n"


@pytest.mark.parametrize("module", ["huggingface_hub", "torch"])
def test_a_build_where_only_the_runtime_is_installed(tmp_path: Path, module: str) -> None:
    program = f"import sys\nsys.modules[{module!r}] = None\n"
    program += "from vlmforge_builder.cli import main\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, str(CHECKPOINT), "-o", str(tmp_path / "e")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "build-engine: BuildError: Building needs libraries" in done.stderr
    assert f"no module {module}" in done.stderr and "pip install 'vlmforge[build]'" in done.stderr
    assert "Traceback" not in done.stderr
