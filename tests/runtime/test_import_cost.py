"""`import vlmforge` stays light: nothing of a build, nothing heavy, nothing loaded twice over."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import vlmforge
import vlmforge.errors

OURS = "vlmforge.api.load, vlmforge.vl, vlmforge.compat"
# What a deployment has loaded anyway as soon as it answers.
LIBRARIES = "numpy, PIL.Image, tokenizers, onnxruntime, jinja2.sandbox"
OF_A_BUILD = (
    *("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "sentencepiece"),
    *("huggingface_hub", "vlmforge_builder", "vlmforge_recipes", "vlmforge_plugins"),
)
LATER = ("onnxruntime", "tokenizers", "prompt_toolkit")
HEAVY = (
    *("multiprocessing", "http", "urllib.request", "email", "xml", "html", "unittest", "pydoc"),
    *("doctest", "pdb", "sqlite3", "ctypes", "tkinter", "curses", "distutils", "setuptools"),
    *("pkg_resources", "importlib.metadata", "cProfile", "ftplib", "lib2to3", "argparse"),
    *("requests", "urllib3", "httpx", "aiohttp", "fastapi", "uvicorn", "pydantic", "yaml", "tqdm"),
    *("rich", "psutil", "scipy", "sklearn", "pandas", "matplotlib", "cv2", "sympy", "numba"),
    *("mpi4py", "tensorrt", "tensorrt_rtx", "cuda", "nccl", "polygraphy", "numpy.testing"),
)


@cache
def loaded(modules: str) -> frozenset[str]:
    """Names of the modules in a fresh interpreter after importing `modules`."""
    program = (
        f"import {modules}\nimport sys\nprint(*sys.modules)"
        if modules
        else ("import sys\nprint(*sys.modules)")
    )
    command = [sys.executable, "-c", program]
    quiet = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split())


def below(names: frozenset[str], packages: tuple[str, ...]) -> list[str]:
    """The names that are one of `packages` or inside one."""
    return sorted(n for n in names if any(f"{n}.".startswith(f"{p}.") for p in packages))


def test_the_probe_sees_what_is_loaded() -> None:
    names = loaded(LIBRARIES)
    assert below(names, (*LATER, "numpy.linalg"))
    assert "vlmforge" not in names
    assert {"vlmforge.vl", "vlmforge.compat"} <= loaded(OURS)


@pytest.mark.parametrize("modules", ["vlmforge", "vlmforge.vl", "vlmforge.compat", OURS])
def test_nothing_of_a_build_is_loaded(modules: str) -> None:
    assert below(loaded(modules), OF_A_BUILD) == []


def test_the_libraries_that_answer_are_loaded_when_an_engine_is() -> None:
    assert below(loaded(OURS), LATER) == []


def test_nothing_heavy_is_added() -> None:
    assert below(loaded(OURS) - loaded(LIBRARIES), HEAVY) == []


def test_the_command_line_costs_as_little() -> None:
    names = loaded("vlmforge.cli")
    assert below(names, (*OF_A_BUILD, *LATER)) == []


@pytest.mark.parametrize(
    "program",
    [
        *("import vlmforge; vlmforge.pipeline", "from vlmforge import EngineConfig"),
        *(
            f"from vlmforge.cli import main; main(['{name}', '/none'])"
            for name in ("chat", "eval", "serve", "verify")
        ),
    ],
)
def test_numpy_is_imported_before_what_imports_it(program: str) -> None:
    """See `vlmforge.early`: deep in other modules it takes longer."""
    command = [sys.executable, "-X", "importtime", "-c", program]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (numpy,) = (line.rpartition("|")[2] for line in told.splitlines() if line.endswith(" numpy"))
    assert numpy == " numpy"  # it is indented by the modules that import it


@pytest.mark.parametrize("name", ["VlmforgeError", "ChatTemplateConfig", "Metrics"])
def test_who_needs_no_numpy_does_not_import_it(name: str) -> None:
    program = f"import sys; from vlmforge import {name}; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_chat_in_a_pipe_loads_no_line_editor() -> None:
    assert below(loaded("vlmforge.cli.chat"), LATER) == []


def test_every_public_name_is_there() -> None:
    assert all(hasattr(vlmforge, name) for name in vlmforge.__all__)
    assert len(set(vlmforge.__all__)) == len(vlmforge.__all__)


def test_errors_are_exported_at_the_top() -> None:
    names = [name for name in vlmforge.__all__ if name.endswith("Error")]
    raised = {name for name in vars(vlmforge.errors) if name.endswith("Error")}
    assert raised == {*names}
    for name in names:
        assert getattr(vlmforge, name) is getattr(vlmforge.errors, name)


def test_the_cost_can_be_measured() -> None:
    script = Path(__file__).parents[2] / "bench/import_cost.py"
    done = subprocess.run(
        [sys.executable, script, "--runs", "1"], capture_output=True, text=True, check=True
    )
    rows = done.stdout.splitlines()
    assert [row.rsplit("import ", 1)[1].split(",")[0] for row in rows] == [
        *("onnxruntime", "vlmforge", "vlmforge.api.load"),
    ]
    assert all(" s " in row and " x " in row for row in rows)


def test_who_serves_an_engine_imports_no_more() -> None:
    """Neither what builds one or saves a session, nor what ranks or engines of others need."""
    names = loaded("vlmforge.api.load, vlmforge.backends.onnxruntime")
    others = ("engine.build_child", "engine.ownership", "api.session_file", "backends.chained")
    policies = ("images.patches", "images.anyres", "images.stretch", "positions.dynamic_ntk")
    others += ("engine.chain", *(f"engine.{name}" for name in policies))
    assert not names & {f"vlmforge.{name}" for name in others}
    assert below(names, ("filelock", "subprocess", "zipfile", "tempfile")) == []
