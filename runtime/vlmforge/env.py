"""The one place where the environment is read."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def private_urls_allowed() -> bool:
    """Whether image URLs may lead to private and loopback addresses."""
    return os.environ.get("VLMFORGE_ALLOW_PRIVATE_URLS", "") == "1"


def cache_dir() -> Path:
    """Where engines that `pipeline(<checkpoint>)` builds are kept, and compiled kernels."""
    if root := os.environ.get("VLMFORGE_CACHE"):
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vlmforge"


def child_environment(libraries: Path | None) -> dict[str, str]:
    """The environment of a child process in Python: this one, with the same search path.

    `libraries` is a folder in which shared libraries are looked for first.
    """
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if libraries is not None:
        places = (str(libraries), environment.get("LD_LIBRARY_PATH", ""))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(p for p in places if p)
    return environment
