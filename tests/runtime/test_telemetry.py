"""Libraries report to nobody: HOME stays clean, and nothing is looked up that nobody asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import IMAGES
from vlmforge.env import TELEMETRY_SWITCHES

# Where one of these is set, ONNX Runtime takes itself to be under test and reports nothing.
_UNDER_TEST = ("CI", "TF_BUILD", "BUILDKITE", "CIRCLECI", "ORT_RUNNING_UNIT_TESTS")
# Every address that Python code looks up or connects to is printed.
_WATCH = """
import sys
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        print("NETWORK", event, arguments, flush=True)
sys.addaudithook(watch)
"""
_ANSWER = """
from vlmforge import GenerationConfig, pipeline
short = GenerationConfig(max_new_tokens=2)
with pipeline(sys.argv[1]) as pipe:
    answer = pipe(("what is this?", sys.argv[2]), gen_config=short)
    print(answer.generate_token_len)
"""
# What a build imports, and the session by which it runs its goldens.
_BUILD = """
import vlmforge_builder.build
from vlmforge.engine.bundle import open_bundle
from vlmforge.backends import LoadOptions, load_backend
from pathlib import Path
bundle = open_bundle(Path(sys.argv[1]))
backend = load_backend(bundle.manifest.backend)
backend.load_vision(bundle.folder, bundle.manifest, LoadOptions(1, 16, 1))
print(2)
"""
# Stands in for the library: says what its switch was when it was imported, and what was called.
_STAND_IN = """
import os
print("switch", os.environ.get("ORT_DISABLE_TELEMETRY"))
def disable_telemetry_events():
    print("disabled")
"""


def environment(**given: str) -> dict[str, str]:
    """This one without what would hide telemetry or send it elsewhere."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*_UNDER_TEST, *TELEMETRY_SWITCHES, "VLMFORGE_ALLOW_TELEMETRY")
        and not name.startswith(("XDG_", "GITHUB_", "HF_", "VLMFORGE_"))
    }
    return kept | given


def run(program: str, *arguments: object, **given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, env=environment(**given), capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("program", [_ANSWER, _BUILD], ids=["answer", "build"])
def test_home_stays_clean_and_nobody_is_called(
    program: str, hf_engine: Path, tmp_path: Path
) -> None:
    home, photo = tmp_path / "home", IMAGES / "alpha_97x61.png"
    home.mkdir()
    places = {"HOME": str(home), "TMPDIR": str(home), "VLMFORGE_CACHE": str(tmp_path / "ours")}
    done = run(_WATCH + program, hf_engine, photo, **places)
    assert done.stdout == "2\n", done.stdout + done.stderr
    assert sorted(home.rglob("*")) == []


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    (tmp_path / "onnxruntime.py").write_text(_STAND_IN)
    return str(tmp_path)


@pytest.mark.parametrize("before", [{}, {"ORT_DISABLE_TELEMETRY": "0"}])
def test_the_switch_is_set_before_the_import(before: dict[str, str], stand_in: str) -> None:
    done = run("import vlmforge.ort", PYTHONPATH=stand_in, **before)
    assert done.stdout == "switch 1\ndisabled\n"
    assert done.stderr == ""


@pytest.mark.parametrize(("own", "seen"), [({}, "None"), ({"ORT_DISABLE_TELEMETRY": "1"}, "1")])
def test_telemetry_can_be_allowed(own: dict[str, str], seen: str, stand_in: str) -> None:
    """Then nothing is touched, so that the library's own switch still holds."""
    done = run("import vlmforge.ort", PYTHONPATH=stand_in, VLMFORGE_ALLOW_TELEMETRY="1", **own)
    assert done.stdout == f"switch {seen}\n"


def test_an_import_that_came_first_is_told(stand_in: str) -> None:
    program = "import onnxruntime, vlmforge.ort"
    late = run(program, PYTHONPATH=stand_in)
    assert late.stdout == "switch None\ndisabled\n"
    assert "onnxruntime was imported before" in late.stderr
    assert "ORT_DISABLE_TELEMETRY=1" in late.stderr
    for quiet in ({"ORT_DISABLE_TELEMETRY": "1"}, {"VLMFORGE_ALLOW_TELEMETRY": "1"}):
        assert run(program, PYTHONPATH=stand_in, **quiet).stderr == ""


@pytest.mark.parametrize("module", ["vlmforge.ort", "vlmforge_builder.hub"])
def test_child_processes_inherit_it(module: str, stand_in: str) -> None:
    program = (
        f"import {module}, os\nprint(*(os.environ.get(name) for name in {TELEMETRY_SWITCHES}))"
    )
    lines = run(program, PYTHONPATH=stand_in).stdout.splitlines()
    assert lines[-1] == "1 1"


def test_importing_vlmforge_alone_changes_nothing() -> None:
    program = "import os\nbefore = dict(os.environ)\nimport vlmforge.api.load, vlmforge.vl\n"
    done = run(program + "print(before == dict(os.environ))")
    assert done.stdout == "True\n"


def test_a_fork_after_encoding_is_quiet(hf_engine: Path) -> None:
    """The tokenizer's library complains in a child when its parent has used its threads."""
    program = """
import os, sys
from pathlib import Path
from vlmforge.inputs.tokenizer import TextTokenizer
tokenizer = TextTokenizer((Path(sys.argv[1]) / "tokenizer.json").read_text("utf-8"))
ids = tokenizer.encode("what is this? " * 500)
child = os.fork()
if child == 0:
    os._exit(tokenizer.encode("what is this? " * 500) != ids)
print(os.waitpid(child, 0)[1])
"""
    done = run(program, hf_engine)
    assert (done.stdout, done.stderr) == ("0\n", "")
