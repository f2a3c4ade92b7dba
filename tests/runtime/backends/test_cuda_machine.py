"""What a machine lacks to run engines of the backend cuda, in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlmforge.backends import load_backend
from vlmforge.backends.cuda import machine
from vlmforge.backends.cuda.machine import MEND, PROVIDER, FoundGpu, check_machine
from vlmforge.errors import BackendUnavailableError

GPU = FoundGpu("NVIDIA H100", 90, 13000, 1 << 30, 2 << 30)
PROVIDERS = [PROVIDER, "CPUExecutionProvider"]


def found(**fields: int) -> Callable[[], FoundGpu]:
    values = {"name": GPU.name, "capability": 90, "driver": 13000, "free": 1, "total": 2, **fields}
    return lambda: FoundGpu(**values)  # type: ignore[arg-type]


def raises(error: Exception) -> Callable[[], FoundGpu]:
    def find() -> FoundGpu:
        raise error

    return find


def test_a_machine_that_has_it_all() -> None:
    assert check_machine(lambda: GPU, PROVIDERS) is GPU
    assert check_machine(found(capability=80), PROVIDERS).capability == 80


@pytest.mark.parametrize(
    ("find", "providers", "words", "fix"),
    [
        (raises(OSError("libcuda.so.1: cannot open")), PROVIDERS, "libcuda.so.1", "nvidia-smi"),
        (raises(RuntimeError("CUDA_ERROR_NO_DEVICE")), PROVIDERS, "NO_DEVICE", "nvidia-smi"),
        (raises(ImportError("No module named 'cuda'")), PROVIDERS, "cuda", "vlmforge[cuda]"),
        (found(driver=12080), PROVIDERS, "CUDA 12.8 (NVIDIA H100)", "a newer NVIDIA driver"),
        (found(capability=75), PROVIDERS, "compute capability 7.5", "--target onnxruntime"),
        (found(), PROVIDERS[1:], "with CPUExecutionProvider", MEND),
    ],
    ids=["no driver", "no device", "no bindings", "old driver", "old GPU", "ONNX Runtime for CPUs"],
)
def test_what_is_missing(
    find: Callable[[], FoundGpu], providers: list[str], words: str, fix: str
) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        check_machine(find, providers)
    assert words in caught.value.found
    assert caught.value.expected
    assert fix in caught.value.fix


def test_this_machine_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of any machine is asked, one that has a GPU too: here it shows none of them."""
    monkeypatch.setattr(machine, "_DRIVER", "libcuda-of-no-machine.so.1")
    backend = load_backend("cuda")
    for ask in (backend.memory, backend.check):
        with pytest.raises(BackendUnavailableError) as caught:
            ask()
        assert "libcuda-of-no-machine.so.1" in caught.value.found
        assert "nvidia-smi" in caught.value.fix
        assert "--target onnxruntime" in caught.value.fix
