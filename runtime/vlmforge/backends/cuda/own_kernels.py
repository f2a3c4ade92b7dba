"""Compiled kernels of an engine that are loaded by themselves on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from vlmforge.errors import BackendUnavailableError
from vlmforge_plugins.cached_attention.config import PTX_TARGETS, TARGETS, Target
from vlmforge_plugins.cached_attention.kernel_store import newest_target
from vlmforge_plugins.errors import PluginError

T = TypeVar("T")
_FIX = "rebuild the engine: build-engine CHECKPOINT -o ENGINE --target cuda --force"


def load_kernels(
    what: str, files: Mapping[str, Path], capability: int, make: Callable[[bytes, Target], T]
) -> T:
    """What `make` gives for the current GPU, whose compute capability is told as 90 for 9.0.

    Raises:
        BackendUnavailableError: none of `files`, by their targets' names, is for it, or readable.
    """
    known = [target for target in (*TARGETS, PTX_TARGETS[False]) if target.name in files]
    target = newest_target(known, capability)
    if target is None:
        raise BackendUnavailableError(
            f"The engine has no kernels of {what} for this GPU.",
            found=f"compute capability {capability / 10:.1f}",
            expected=", ".join(sorted(files)) or "an engine that was built with kernels",
            fix=_FIX,
        )
    try:
        return make(files[target.name].read_bytes(), target)
    except PluginError as error:
        raise BackendUnavailableError(
            error.summary, found=error.found, expected=error.expected, fix=error.fix
        ) from error
    except OSError as error:
        raise BackendUnavailableError(
            f"The kernels {files[target.name]} cannot be read.",
            found=str(error.strerror),
            expected="a file that can be read",
            fix=_FIX,
        ) from error
