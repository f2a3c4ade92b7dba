"""The kernel of gated activations on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlmforge.errors import BackendUnavailableError
from vlmforge_plugins.cached_attention.config import PTX_TARGETS, TARGETS
from vlmforge_plugins.cached_attention.kernel_store import newest_target
from vlmforge_plugins.errors import PluginError
from vlmforge_plugins.gated_activation.driver import CudaKernels


def loaded_gates(name: str, files: Mapping[str, Path], capability: int) -> CudaKernels:
    """The one called `name` for the current GPU, whose compute capability is told as 90 for 9.0.

    Raises:
        BackendUnavailableError: none of `files`, by their targets' names, is for it, or readable.
    """
    known = [target for target in (*TARGETS, PTX_TARGETS[False]) if target.name in files]
    target = newest_target(known, capability)
    if target is None:
        raise BackendUnavailableError(
            "The engine has no kernels of gated activations for this GPU.",
            found=f"compute capability {capability / 10:.1f}",
            expected=", ".join(sorted(files)) or "an engine that was built with kernels",
            fix="rebuild the engine: build-engine CHECKPOINT -o ENGINE --target cuda --force",
        )
    try:
        return CudaKernels(files[target.name].read_bytes(), target, name)
    except PluginError as error:
        raise BackendUnavailableError(
            error.summary, found=error.found, expected=error.expected, fix=error.fix
        ) from error
    except OSError as error:
        raise BackendUnavailableError(
            f"The kernels {files[target.name]} cannot be read.",
            found=str(error.strerror),
            expected="a file that can be read",
            fix="rebuild the engine: build-engine CHECKPOINT -o ENGINE --target cuda --force",
        ) from error
