"""Backends of plans: what each machine is told."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import tensorrt_rtx

from vlmforge.backends import fake_plans, load_backend, plans
from vlmforge.backends.cuda import machine
from vlmforge.backends.cuda.machine import FoundGpu
from vlmforge.backends.plans import load_library
from vlmforge.errors import BackendUnavailableError


def refusal(name: str) -> BackendUnavailableError:
    with pytest.raises(BackendUnavailableError) as caught:
        load_backend(name).check()
    return caught.value


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries are installed, and so is a driver."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)


@pytest.mark.usefixtures("driver")
def test_the_library_itself_refuses_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    found = FoundGpu("NVIDIA H100 80GB HBM3", 90, 13000, 1, 2)
    monkeypatch.setattr(machine, "find_gpu", lambda: found)
    error = refusal("tensorrt_rtx")
    assert "TensorRT-RTX does not support this compute capability" in error.summary
    assert error.found == "NVIDIA H100 80GB HBM3, compute capability 9.0"
    assert "--target cuda" in error.fix
    load_backend("tensorrt").check()  # which knows of no such refusal


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("reason", "summary"),
    [
        (OSError("libcuda.so.1: no such file"), "needs an NVIDIA GPU"),
        (RuntimeError("CUDA_ERROR_NO_DEVICE"), "needs an NVIDIA GPU"),
        (ImportError("No module named 'cuda'"), "needs the bindings of CUDA"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_no_gpu_that_answers(
    monkeypatch: pytest.MonkeyPatch, reason: Exception, summary: str
) -> None:
    def find() -> FoundGpu:
        raise reason

    monkeypatch.setattr(machine, "find_gpu", find)
    error = refusal("tensorrt_rtx")
    assert f"backend tensorrt_rtx {summary}" in error.summary
    assert str(reason) in error.found


@pytest.mark.usefixtures("driver")
def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_gpu", lambda: FoundGpu("Tesla T4", 75, 13000, 1, 2))
    assert refusal("tensorrt").summary == "The GPU is too old."


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refusal("tensorrt")
    assert (error.found, error.expected) == ("no module tensorrt", "tensorrt")
    assert "pip install 'vlmforge[tensorrt]'" in error.fix


def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr("vlmforge.backends.plans.importlib.import_module", broken)
    with pytest.raises(BackendUnavailableError) as caught:
        load_library("tensorrt")
    assert "libnvinfer.so.11" in caught.value.found


# --- the stand-in is as the library ---------------------------------------------------------------

REAL = {
    fake_plans._Runtime: tensorrt_rtx.Runtime,
    fake_plans._Engine: tensorrt_rtx.ICudaEngine,
    fake_plans._Context: tensorrt_rtx.IExecutionContext,
}
CALLED = [
    pytest.param(fake, name, id=f"{fake.__name__}.{name}")
    for fake in REAL
    for name in sorted(vars(fake))
    if not name.startswith("_")
    and (callable(vars(fake)[name]) or isinstance(vars(fake)[name], property))
    and name != "fails"
]


def overloads(function: object) -> list[list[str]]:
    """The arguments' names of each form of a function of the library, of its docstring."""
    found = re.findall(r"^(?:\d+\. )?\w+\(self: [\w.]+(.*)\) ->", str(function.__doc__), re.M)
    return [re.findall(r"(?:^|, )(\w+): ", form) for form in found]


@pytest.mark.parametrize(("fake", "name"), CALLED)
def test_the_library_has_what_the_stand_in_has(fake: type, name: str) -> None:
    ours, real = vars(fake)[name], getattr(REAL[fake], name)
    if isinstance(ours, property):
        assert isinstance(real, property)
        return
    _, *arguments = inspect.signature(ours).parameters
    assert arguments in overloads(real)


def test_nothing_else_of_the_library_is_called() -> None:
    """`engine`, `context` and `runtime` are asked for nothing that the stand-in does not have."""
    asked: dict[str, set[str]] = {"engine": set(), "context": set(), "runtime": set()}
    for node in ast.walk(ast.parse(Path(str(plans.__file__)).read_text("utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = getattr(owner, "id", getattr(owner, "attr", ""))
            if name in asked:
                asked[name].add(node.attr)
    for name, fake in zip(
        asked, (fake_plans._Engine, fake_plans._Context, fake_plans._Runtime), strict=True
    ):
        assert asked[name], name
        assert asked[name] <= {*vars(fake)}, name


def test_names_of_the_module() -> None:
    library = fake_plans.stand_in_library("tensorrt_rtx")
    for name in vars(library):
        assert hasattr(tensorrt_rtx, name), name
    severities = tensorrt_rtx.ILogger.Severity.__members__
    assert {*fake_plans._Severity.__members__} == {*severities}
    strategies = tensorrt_rtx.ExecutionContextAllocationStrategy
    assert hasattr(strategies, "USER_MANAGED")
