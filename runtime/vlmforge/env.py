"""The one place where the environment is read."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vlmforge.errors import ConfigError


def private_urls_allowed() -> bool:
    """Whether image URLs may lead to private and loopback addresses."""
    return os.environ.get("VLMFORGE_ALLOW_PRIVATE_URLS", "") == "1"


def cache_dir() -> Path:
    """Where engines that `pipeline(<checkpoint>)` builds are kept, and compiled kernels.

    Raises:
        ConfigError: nothing says where, and this user has no home directory.
    """
    if root := os.environ.get("VLMFORGE_CACHE"):
        return expanded(root)
    return _caches() / "vlmforge"


def writable_cache(name: str) -> Path | None:
    """The folder `name` of the cache, made if need be; None where that cannot be written to."""
    try:
        folder = cache_dir() / name
        folder.mkdir(parents=True, exist_ok=True)
    except (ConfigError, OSError):
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def heap_chosen() -> bool:
    """Whether somebody decided already how the C library keeps memory: see mallopt(3).

    (Not by `glibc.malloc.hugetlb`, which asks for larger pages of the same memory.)
    """
    names = (f"MALLOC_{name}" for name in ("ARENA_MAX", "MMAP_THRESHOLD_", "TRIM_THRESHOLD_"))
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    tuned = {tunable.partition("=")[0].strip() for tunable in tunables}
    return any(name in os.environ for name in names) or any(
        name.startswith("glibc.malloc.") for name in tuned - {"glibc.malloc.hugetlb"}
    )


def _caches() -> Path:
    if root := os.environ.get("XDG_CACHE_HOME"):
        return expanded(root)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        raise ConfigError(
            "There is no place to keep engines and kernels: this user has no home directory.",
            found=f"no HOME, and no entry for user {os.getuid()} in the list of users",
            expected="a cache directory",
            fix="set the environment variable VLMFORGE_CACHE (or HOME) to a folder that can be "
            "written to, or build-engine CHECKPOINT -o ENGINE and pipeline('ENGINE')",
        ) from None


def expanded(path: str) -> Path:
    """`path` with the home directory in place of `~` or `~user` (ConfigError: there is none)."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path} names a home directory that is not known.",
            found="no HOME, or no such user",
            expected="a path whose ~ stands for a folder",
            fix="write the path out, or set HOME",
        ) from None


def child_environment(libraries: Path | None) -> dict[str, str]:
    """The environment of a child process in Python: this one, with the same search path.

    `libraries` is a folder in which shared libraries are looked for first.
    """
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if libraries is not None:
        places = (str(libraries), environment.get("LD_LIBRARY_PATH", ""))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(p for p in places if p)
    return environment


def api_keys() -> tuple[str, ...]:
    """Keys that open a server, from `VLMFORGE_API_KEYS`: between commas; none if it is not set.

    The environment is where deployments keep secrets: arguments are seen by every user of a host.
    """
    keys = os.environ.get("VLMFORGE_API_KEYS", "").split(",")
    return tuple(key.strip() for key in keys if key.strip())


# What libraries read, once, when they are imported. The second also leaves names and versions of
# other software out of the hub client's requests, and a list of programs that it would fetch.
TELEMETRY_SWITCHES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")


def telemetry_allowed() -> bool:
    """Whether libraries may report to their makers, as each is set up to; off unless asked for."""
    return os.environ.get("VLMFORGE_ALLOW_TELEMETRY", "") == "1"


def refuse_telemetry() -> tuple[str, ...]:
    """Switch telemetry off for libraries not imported yet, here and in child processes.

    Returns:
        The switches that were not set so already; none where telemetry is allowed.
    """
    if telemetry_allowed():
        return ()
    turned = tuple(name for name in TELEMETRY_SWITCHES if os.environ.get(name) != "1")
    os.environ.update(dict.fromkeys(TELEMETRY_SWITCHES, "1"))
    return turned
