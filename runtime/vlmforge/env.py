"""The one place where the environment is read."""

from __future__ import annotations

import os
from pathlib import Path


def private_urls_allowed() -> bool:
    """Whether image URLs may lead to private and loopback addresses."""
    return os.environ.get("VLMFORGE_ALLOW_PRIVATE_URLS", "") == "1"


def cache_dir() -> Path:
    """Where engines that `pipeline(<checkpoint>)` builds are kept."""
    if root := os.environ.get("VLMFORGE_CACHE"):
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vlmforge"
