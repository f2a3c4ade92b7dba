"""Whether this machine runs engines of the backend `cuda`, and what to do if it does not."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
from collections.abc import Callable, Sequence

from msgspec import Struct

from vlmforge.errors import BackendUnavailableError
from vlmforge.ort import ort

PROVIDER = "CUDAExecutionProvider"
LEAST_DRIVER, LEAST_CAPABILITY = 13000, 80
_DRIVER = "libcuda.so.1"
_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_ELSEWHERE = "to run the model on this machine's processor, build it with --target onnxruntime"
# Both are one Python package, so that the last one wins: the other must be gone before.
MEND = f"pip uninstall -y {' '.join(_PACKAGES)}; pip install 'onnxruntime-gpu[cuda,cudnn]>=1.31'"


class FoundGpu(Struct, frozen=True):
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


Find = Callable[[], FoundGpu]


def check_machine(find: Find, providers: Sequence[str]) -> FoundGpu:
    """The GPU that engines of the backend `cuda` run on.

    Args:
        find: See `check_gpu`.
        providers: That the imported ONNX Runtime has.

    Raises:
        BackendUnavailableError: see `check_gpu`; or an ONNX Runtime for processors.
    """
    gpus = "an NVIDIA GPU of compute capability 8.0 or higher"
    gpu = check_gpu(find, "cuda", gpus, _ELSEWHERE)
    if PROVIDER not in providers:
        raise BackendUnavailableError(
            "This ONNX Runtime has no CUDA provider.",
            found=f"{installed_onnxruntime()}, with {', '.join(providers)}",
            expected="onnxruntime-gpu, and no onnxruntime that was installed over it",
            fix=f"{MEND}; {_ELSEWHERE}",
        )
    return gpu


def check_gpu(find: Find, backend: str, gpus: str, elsewhere: str) -> FoundGpu:
    """The GPU that engines of a backend run on.

    Args:
        find: Asks the driver. OSError: it is not installed; ImportError: nor are the bindings;
            RuntimeError: it has no answer.
        backend: Its name.
        gpus: What it runs on.
        elsewhere: What to do without a GPU.

    Raises:
        BackendUnavailableError: no GPU, one that is too old, or whose driver is.
    """
    gpu = _answering(find, backend, gpus, elsewhere)
    if gpu.driver < LEAST_DRIVER:
        raise BackendUnavailableError(
            "The NVIDIA driver is too old.",
            found=f"a driver for CUDA {gpu.driver // 1000}.{gpu.driver % 1000 // 10} ({gpu.name})",
            expected="CUDA 13.0 or later, that is driver 580 or later",
            fix=f"install a newer NVIDIA driver; {elsewhere}",
        )
    if gpu.capability < LEAST_CAPABILITY:
        raise BackendUnavailableError(
            "The GPU is too old.",
            found=f"{gpu.name}, compute capability {gpu.capability / 10:.1f}",
            expected="compute capability 8.0 or higher (Ampere and later)",
            fix=elsewhere,
        )
    return gpu


def _answering(find: Find, backend: str, gpus: str, elsewhere: str) -> FoundGpu:
    try:
        return find()
    except ImportError as error:
        raise BackendUnavailableError(
            f"The backend {backend} needs the bindings of CUDA.",
            found=str(error),
            expected="cuda-bindings 13 or later",
            fix="pip install 'vlmforge[cuda]'",
        ) from error
    except (OSError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"An engine of the backend {backend} needs an NVIDIA GPU.",
            found=f"no GPU that answers: {error}",
            expected=f"{gpus}, and its driver",
            fix="nvidia-smi tells whether the driver sees one (in a container: --gpus all); "
            f"{elsewhere}",
        ) from error


def find_gpu(number: int = 0) -> FoundGpu:
    """Ask the driver for a GPU, the first; see `check_machine` for what it raises."""
    ctypes.CDLL(_DRIVER)
    from cuda.bindings import driver

    from vlmforge.backends.cuda.gpu import visited
    from vlmforge_plugins.cached_attention.driver import call, capability
    from vlmforge_plugins.errors import LaunchError

    try:
        call(driver.cuInit, 0)
        if number >= (count := int(call(driver.cuDeviceGetCount))):
            raise RuntimeError(f"number {number}, of {count}")
        name = call(driver.cuDeviceGetName, 128, call(driver.cuDeviceGet, number))
        with visited(number):
            free, total = call(driver.cuMemGetInfo)
        known = int(call(driver.cuDriverGetVersion))
    except LaunchError as error:
        raise RuntimeError(error.found) from error
    words = bytes(name).partition(b"\0")[0].decode(errors="replace").strip()
    return FoundGpu(words, capability(number), known, int(free), int(total))


def installed_onnxruntime() -> str:
    """The distributions that there are. They install one Python package: the last one wins."""
    found = []
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return " and ".join(found) or f"onnxruntime {ort.__version__}"


def preload() -> str:
    """Load CUDA's libraries from their wheels; what could not be, in the library's words."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    return said.getvalue().strip()
