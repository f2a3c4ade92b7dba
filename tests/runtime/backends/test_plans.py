"""Backends of plans: what each machine is told."""

from __future__ import annotations

import ctypes
import importlib.util

import pytest

from vlmforge.backends import load_backend
from vlmforge.backends.cuda import machine
from vlmforge.backends.cuda.machine import FoundGpu
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
    assert "does not run them" in refusal("tensorrt").summary


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("reason", [None, OSError("no"), ImportError("no"), RuntimeError("no")])
def test_on_others_plans_are_not_run_yet(
    monkeypatch: pytest.MonkeyPatch, reason: Exception | None
) -> None:
    def find() -> FoundGpu:
        if reason is not None:
            raise reason
        return FoundGpu("NVIDIA RTX 4090", 89, 13000, 1, 2)

    monkeypatch.setattr(machine, "find_gpu", find)
    assert "does not run them" in refusal("tensorrt_rtx").summary
