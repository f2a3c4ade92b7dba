"""Whether this machine runs engines of the backend `cuda`, and what to do if it does not."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass

from vlmforge.errors import BackendUnavailableError
from vlmforge.ort import ort

_DRIVER = "libcuda.so.1"
_PROVIDER = "CUDAExecutionProvider"
LEAST_DRIVER, LEAST_CAPABILITY = 13000, 80
_ELSEWHERE = "to run the model on this machine's processor, build it with --target onnxruntime"
# Both install the same Python package, so that the one that came last is there.
MEND = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'vlmforge[cuda]'"


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the driver says of the first GPU.

    Attributes:
        name: Of the card.
        capability: Compute capability, major times 10 plus minor.
        driver: The newest CUDA that the driver knows, major times 1000 plus minor times 10.
        free, total: Bytes of its memory.
    """

    name: str
    capability: int
    driver: int
    free: int
    total: int


Find = Callable[[], Gpu]


def installed_onnxruntime() -> str:
    """The distributions that there are, and which one was installed last, in words."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    kind = "with" if _PROVIDER in ort.get_available_providers() else "without"
    return f"{' and '.join(found) or 'onnxruntime'}; what is imported is {kind} CUDA"


def check_libraries() -> None:
    """BackendUnavailableError: an ONNX Runtime for processors, or no bindings of CUDA."""
    if _PROVIDER not in ort.get_available_providers():
        raise BackendUnavailableError(
            "This ONNX Runtime has no CUDA provider.",
            found=installed_onnxruntime(),
            expected="onnxruntime-gpu, and no onnxruntime that was installed over it",
            fix=f"{MEND}; {_ELSEWHERE}",
        )
    if importlib.util.find_spec("cuda.bindings") is None:
        raise BackendUnavailableError(
            "The backend cuda needs the bindings of CUDA.",
            found="no module cuda.bindings",
            expected="cuda-bindings 13 or later",
            fix="pip install 'vlmforge[cuda]'",
        )


def check_gpu(find: Find) -> Gpu:
    """The GPU (BackendUnavailableError: none, or one that is too old, or its driver is)."""
    try:
        ctypes.CDLL(_DRIVER)
        gpu = find()
    except (OSError, RuntimeError) as error:  # the bindings' own are RuntimeErrors
        raise _no_gpu(str(error)) from error
    if gpu.driver < LEAST_DRIVER:
        raise BackendUnavailableError(
            "The NVIDIA driver is too old.",
            found=f"a driver for CUDA {gpu.driver // 1000}.{gpu.driver % 1000 // 10} ({gpu.name})",
            expected="CUDA 13.0 or later, that is driver 580 or later",
            fix="install a newer NVIDIA driver; " + _ELSEWHERE,
        )
    if gpu.capability < LEAST_CAPABILITY:
        raise BackendUnavailableError(
            "The GPU is too old.",
            found=f"{gpu.name}, compute capability {gpu.capability / 10:.1f}",
            expected="compute capability 8.0 or higher (Ampere and later)",
            fix=_ELSEWHERE,
        )
    return gpu


def _no_gpu(found: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        "An engine of the backend cuda needs an NVIDIA GPU.",
        found=f"no GPU that answers: {found}",
        expected="an NVIDIA GPU of compute capability 8.0 or higher, and its driver",
        fix=f"nvidia-smi tells whether the driver sees one (in a container: --gpus all); "
        f"{_ELSEWHERE}",
    )


def find_gpu() -> Gpu:
    """Ask the driver (RuntimeError: it has no answer)."""
    from cuda.bindings import driver

    from vlmforge.backends.cuda.gpu import enter
    from vlmforge_plugins.cached_attention.driver import call, capability
    from vlmforge_plugins.errors import LaunchError

    try:
        enter()
        device = call(driver.cuDeviceGet, 0)
        name = call(driver.cuDeviceGetName, 128, device)
        free, total = call(driver.cuMemGetInfo)
        known = int(call(driver.cuDriverGetVersion))
    except LaunchError as error:
        raise RuntimeError(error.found) from error
    return Gpu(name.decode().rstrip("\0"), capability(), known, int(free), int(total))


def preload() -> str:
    """Load CUDA's libraries from their wheels; what could not be, in the library's words."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls(cudnn=False)
    return said.getvalue().strip()
