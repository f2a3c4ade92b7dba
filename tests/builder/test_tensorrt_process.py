"""The compiling process: what it is told, and what is said of it when it refuses or dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from conftest import DATA, HANGS
from vlmforge.errors import BuildError, ConfigError
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress
from vlmforge_builder.tensorrt.flavours import (
    TENSORRT,
    TENSORRT_RTX,
    Flavour,
    capability_name,
    check_installed,
    library_path,
)
from vlmforge_builder.tensorrt.job import CompileRequest
from vlmforge_builder.tensorrt.process import run_compiler

# A library that the compiler imports instead of the real one; `{ending}` is how its build ends.
LIBRARY = """
import enum, os, sys

__version__ = "0.0"

class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

class IProgressMonitor:
    pass

class IStreamWriter:
    pass

class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 0

class Network:
    num_layers = num_inputs = 0

class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        pass

    def parse_from_file(self, path):
        return {parses}

    def get_error(self, index):
        class Error:
            def desc(self):
                return "no such op: Frobnicate"
        return Error()

class Config:
    progress_monitor = None

class Builder:
    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        return Network()

    def create_builder_config(self):
        return Config()

    def build_serialized_network_to_stream(self, network, config, writer):
        config.progress_monitor.phase_start("Building", None, 4)
        config.progress_monitor.step_complete("Building", 1)
        config.progress_monitor.phase_start("Choosing kernels", "Building", 2)
        print("library: about to end", file=sys.stderr, flush=True)
        print("words of the library that are no event", flush=True)
        {ending}
"""


@pytest.fixture
def flavour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    monkeypatch.syspath_prepend(tmp_path)
    return Flavour("made_up", "made_up_library", "made-up", "made_up_libraries", None, ())


def library(folder: Path, ending: str, parses: bool = True) -> None:
    text = textwrap.dedent(LIBRARY).replace("{ending}", ending).replace("{parses}", str(parses))
    (folder / "made_up_library.py").write_text(text, "utf-8")


def request(folder: Path) -> CompileRequest:
    return CompileRequest(
        module="made_up_library",
        graph=str(folder / "part.onnx"),
        plan=str(folder / "part.plan"),
        layers=str(folder / "part.layers.json"),
        profiles=(),
        capability=None,
        kernels=None,
        cache=str(folder),
    )


def test_a_plan_is_written_and_steps_are_told(tmp_path: Path, flavour: Flavour) -> None:
    library(tmp_path, "return writer.write(b'plan') == 4")
    steps: list[tuple[int, int]] = []
    done = run_compiler(flavour, request(tmp_path), lambda *step: steps.append(step))
    assert (done.version, done.peak_rss_bytes > 1 << 20) == ("0.0", True)
    assert (tmp_path / "part.plan").read_bytes() == b"plan"
    assert steps == [(2, 4)]


DEATHS = {
    "killed by SIGKILL": "os.kill(os.getpid(), 9)",
    "killed by SIGSEGV": "os.kill(os.getpid(), 11)",
    "killed by SIGABRT": "os.abort()",
    "exit status 7": "os._exit(7)",
    "exit status 1": "raise RuntimeError('out of luck')",
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_process_that_dies(tmp_path: Path, flavour: Flavour, death: str) -> None:
    library(tmp_path, DEATHS[death])
    with pytest.raises(BuildError) as caught:
        run_compiler(flavour, request(tmp_path), lambda *_: None)
    error = caught.value
    assert error.summary == "The process that compiles the part 'part' with made_up died."
    assert error.found.startswith(f"{death} in stage 'compile', last phase 'Choosing kernels'")
    assert "library: about to end" in error.found
    assert ("free memory" in error.fix) == (death == "killed by SIGKILL")


# A library that never comes back to Python, in a process that has a lock.
SPINS = (
    "import signal; signal.alarm(600); "  # if nothing else ends it
    "from filelock import FileLock; lock = FileLock('lock'); lock.acquire(); "
    "config.progress_monitor.step_complete('Building', 2); sum(iter(int, 1))"
)
CALLER = """
import sys
from pathlib import Path
sys.path[:0] = ["."]
from vlmforge_builder.tensorrt.flavours import Flavour
from vlmforge_builder.tensorrt.job import CompileRequest
from vlmforge_builder.tensorrt.process import run_compiler
flavour = Flavour("made_up", "made_up_library", "made-up", "made_up_libraries", None, ())
request = CompileRequest(
    "made_up_library", "part.onnx", "part.plan", "part.layers.json", (), None, None, "."
)
run_compiler(flavour, request, lambda done, steps: print(done, flush=True))
"""


@pytest.mark.parametrize("death", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_ends_with_the_build(tmp_path: Path, death: signal.Signals) -> None:
    library(tmp_path, SPINS)
    command = [sys.executable, "-c", CALLER]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as build:
        assert build.stdout is not None
        assert [build.stdout.readline(), build.stdout.readline()] == ["2\n", "3\n"]
        build.send_signal(death)
    with FileLock(tmp_path / "lock").acquire(timeout=HANGS):
        assert not (tmp_path / "part.plan").read_bytes()


def test_words_of_a_library_that_are_no_text(tmp_path: Path, flavour: Flavour) -> None:
    library(tmp_path, "os.write(1, b'\\xff\\n'); os.write(2, b'\\xfe\\n'); os._exit(3)")
    with pytest.raises(BuildError, match=r"died") as caught:
        run_compiler(flavour, request(tmp_path), lambda *_: None)
    assert caught.value.found.startswith("exit status 3")
    assert caught.value.found.endswith("\ufffd")


def test_no_temporary_directory_is_needed(
    tmp_path: Path, flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, "return writer.write(b'plan') == 4")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    run_compiler(flavour, request(tmp_path), lambda *_: None)
    assert (tmp_path / "part.plan").exists()


def test_a_graph_that_is_refused(tmp_path: Path, flavour: Flavour) -> None:
    library(tmp_path, "pass", parses=False)
    with pytest.raises(BuildError, match=r"refused the part 'part' \(parse\)") as caught:
        run_compiler(flavour, request(tmp_path), lambda *_: None)
    assert caught.value.found == "no such op: Frobnicate"
    library(tmp_path, "self.logger.log(ILogger.Severity.ERROR, 'no kernel for it'); return False")
    with pytest.raises(BuildError, match=r"\(compile\)") as caught:
        run_compiler(flavour, request(tmp_path), lambda *_: None)
    assert caught.value.found == "no kernel for it"


# --- the flavours ------------------------------------------------------------------------------


def test_a_library_that_is_not_installed() -> None:
    with pytest.raises(BuildError) as caught:
        check_installed(TENSORRT)
    assert caught.value.found == "no module tensorrt"
    assert caught.value.fix == "pip install 'vlmforge[build,tensorrt]'"
    check_installed(TENSORRT_RTX)


def test_the_name_that_the_parser_asks_for(tmp_path: Path) -> None:
    with library_path(TENSORRT_RTX, tmp_path) as folder:
        assert folder is not None
        (link,) = folder.iterdir()
        assert link.name == "libtensorrt_rtx.so"
        assert link.resolve().name.startswith("libtensorrt_rtx.so.1")
    assert not folder.exists()
    with library_path(TENSORRT, tmp_path) as folder:
        assert folder is None


@pytest.mark.parametrize(
    ("flavour", "wanted", "expected"),
    [(TENSORRT_RTX, "9.0", "7.5, 8.0, 8.6, 8.9, 12.0, 12.1"), (TENSORRT, "8.0", "none: plans are")],
)
def test_a_compute_capability_that_is_not_compiled_for(
    flavour: Flavour, wanted: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        capability_name(flavour, wanted)
    assert caught.value.found == repr(wanted)
    assert caught.value.expected.startswith(expected)
    assert capability_name(TENSORRT_RTX, "8.9") == "SM89"
    assert capability_name(flavour, None) is None


# --- builds that cannot be ---------------------------------------------------------------------

OPTIONS = BuildOptions(
    str(DATA / "yi_vl" / "checkpoint"), Path("it"), target="tensorrt_rtx", dtype="float16"
)
REFUSED = {
    "float32": (replace(OPTIONS, dtype="float32"), "--dtype float32"),
    "attention": (replace(OPTIONS, attention="flash"), "'flash'"),
    "capability": (replace(OPTIONS, compute_capability="9.0"), "'9.0'"),
    "no kernels for Turing": (
        replace(OPTIONS, compute_capability="7.5"),
        "--compute-capability 7.5 with a cache in float16",
    ),
    "fp8 on Ampere": (
        replace(OPTIONS, kv_dtype="fp8", compute_capability="8.0"),
        "--compute-capability 8.0 with a cache in float8_e4m3fn",
    ),
    "fp8 without the plugin": (
        replace(OPTIONS, kv_dtype="fp8", attention="native"),
        "--attention native --kv-dtype fp8",
    ),
    "another cache": (replace(OPTIONS, kv_dtype="int4"), "--kv-dtype int4"),
    "fp8 of a graph": (replace(OPTIONS, target="onnxruntime", kv_dtype="fp8"), "'fp8'"),
    "weights": (replace(OPTIONS, weights="int2"), "--weights int2"),
    "attention of a graph": (
        replace(OPTIONS, target="onnxruntime", attention="native"),
        "'native'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_a_target_does_not_have(case: str, tmp_path: Path) -> None:
    options, found = REFUSED[case]
    with Progress(text=sys.stderr) as progress, pytest.raises(ConfigError) as caught:
        build_engine(replace(options, output=tmp_path / "it"), progress)
    assert caught.value.found == found
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_dies_leaves_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real build, with a compiler that ends at once."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "tensorrt_rtx.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path / "code")
    options = replace(OPTIONS, output=tmp_path / "out" / "it", session_len=512)
    with Progress(text=sys.stderr) as progress, pytest.raises(BuildError) as caught:
        build_engine(options, progress)
    assert caught.value.found.startswith("killed by SIGABRT in stage 'start', last phase 'none'")
    assert list((tmp_path / "out").iterdir()) == []
