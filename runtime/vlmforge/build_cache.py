"""Engines that `pipeline(<checkpoint>)` builds: once, by a child process, kept by content.

A child process, because a build needs libraries that serving must not load, because its memory
goes back when it ends, and because its crash is then a message and not ours.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from vlmforge import env
from vlmforge.errors import BuildError
from vlmforge.manifest import MANIFEST_FILE
from vlmforge.version import __version__


def engine_for(path: str, options: Mapping[str, str]) -> Path:
    """The engine directory of `path`: itself, or one built from it as a checkpoint.

    Args:
        path: An engine directory, a checkpoint folder, or a hub id.
        options: Long options of `build-engine` and their values.

    Raises:
        BuildError: neither of them, the builder is not installed, or it failed.
    """
    folder = Path(path)
    if (folder / MANIFEST_FILE).exists():
        return folder
    if folder.exists() and not (folder / "config.json").exists():
        raise BuildError(
            f"{path} is neither an engine nor a checkpoint.",
            found="neither engine.json nor config.json in it",
            expected="an engine directory, a checkpoint folder, or a hub id such as org/name",
            fix="build-engine CHECKPOINT -o ENGINE, then pipeline('ENGINE')",
        )
    engine = env.cache_dir() / "engines" / f"{folder.name}-{_key(path, options)}"
    if not (engine / MANIFEST_FILE).exists():
        _build(path, engine, options)
    return engine


def _key(path: str, options: Mapping[str, str]) -> str:
    """Changes with the files of a folder (names, sizes, times of change) and with the options.

    A hub id stands for itself: give a `revision` to follow a newer one.
    """
    digest = hashlib.sha256(f"{__version__}\n{sorted(options.items())}".encode())
    folder = Path(path)
    if folder.is_dir():
        digest.update(str(folder.resolve()).encode())
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            stat = file.stat()
            digest.update(
                f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode()
            )
    else:
        digest.update(path.encode())
    return digest.hexdigest()[:16]


def _build(path: str, engine: Path, options: Mapping[str, str]) -> None:
    missing = [name for name in ("torch", "onnx", "onnxscript") if not _installed(name)]
    if missing:
        raise BuildError(
            f"{path} is a checkpoint, and the builder is not installed here.",
            found="no " + ", ".join(missing),
            expected="what build-engine needs, or an engine that was built elsewhere",
            fix="pip install 'vlmforge[build]'",
        )
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    # -P: a module in the working directory, which may be the checkpoint's, is never imported.
    command = [sys.executable, "-P", "-m", "vlmforge_builder", path, "-o", str(engine), *arguments]
    print(f"vlmforge: building an engine of {path} once, into {engine}", file=sys.stderr)
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise _failed(path, status)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _failed(path: str, status: int) -> BuildError:
    if status == -9:
        return BuildError(
            f"The build of {path} was killed.",
            found="signal 9, which is what the system sends when memory is short",
            expected="a build that ends",
            fix="free memory, or build on a bigger machine: build-engine CHECKPOINT -o ENGINE",
        )
    return BuildError(
        f"The build of {path} failed; nothing was published.",
        found=f"build-engine ended with status {status}; its message is above",
        expected="status 0",
        fix="mend what the message names, then call pipeline() again",
    )
