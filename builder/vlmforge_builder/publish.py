"""Write an engine beside its place, then rename it there: all of it or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmforge.errors import BuildError
from vlmforge.manifest import MANIFEST_FILE, FileEntry
from vlmforge_builder.weights import sha256

_MARK = ".building-"


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, renamed to it at the end and removed on any failure.

    Folders that a killed build left behind are removed first. An engine that is there already is
    replaced only once the new one is whole.

    Raises:
        BuildError: `target` cannot be written to, or is something that is not an engine.
    """
    _refuse_foreign(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        folder = target.parent / f".{target.name}{_MARK}{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise BuildError(
            f"The engine cannot be written to {target}.",
            found=str(error),
            expected="a place that can be written to",
            fix="choose another -o, or free space and permissions there",
        ) from error
    try:
        yield folder
        _rename(folder, target)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise BuildError(
                f"Writing the engine {target} failed; nothing was published.",
                found=str(error),
                expected="enough space and permission to write",
                fix="free space there, or choose another -o",
            ) from error
        raise


def _refuse_foreign(target: Path) -> None:
    if not target.exists() and not target.is_symlink():
        return
    is_engine = target.is_dir() and (target / MANIFEST_FILE).exists()
    is_empty = target.is_dir() and not any(target.iterdir())
    if not (is_engine or is_empty):
        kind = "a folder without engine.json" if target.is_dir() else "a file"
        raise BuildError(
            f"{target} exists and is not an engine; it was left alone.",
            found=kind,
            expected="a path that does not exist, an empty folder or an engine",
            fix="choose another -o, or remove it yourself",
        )


def _sweep(target: Path) -> None:
    for folder in target.parent.glob(f".{target.name}{_MARK}*"):
        pid, _, kind = folder.name.partition(_MARK)[2].partition("-")
        if Path(f"/proc/{pid}").exists():
            continue
        if kind == "old" and not target.exists():
            folder.rename(target)  # the crash came between the two renames
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, target: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)
    if not target.exists():
        folder.rename(target)
        return
    old = folder.with_name(f"{folder.name}-old")
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make sure that a crash after the rename cannot leave an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below `folder` with its size and sha256, in the order of their names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, sha256(path))
        for path in paths
    )
