"""Write an engine beside its place, then rename it there: all of it or nothing, one at a time."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from vlmforge.engine.manifest import MANIFEST_FILE, FileEntry
from vlmforge.engine.ownership import HeldError, sole_owner
from vlmforge.errors import BuildError
from vlmforge_builder.checkpoint.fingerprint import sha256

_MARK = ".building-"
_OLD = "-old"
_LOCK = ".building.lock"


@contextmanager
def sole_build(target: Path, on_wait: Callable[[str], None] | None) -> Iterator[None]:
    """The right to build `target`, which nobody else has meanwhile, in no container.

    Args:
        target: Where the engine will be.
        on_wait: Gets the other build's name if there is one, which is then waited for; None: it is
            an error.

    Raises:
        BuildError: another build has it, or its folder cannot be written to.
    """
    _refuse_dangling(target)
    target = _absolute(target)
    lock = target.with_name(f".{target.name}{_LOCK}")
    with _explained(target):
        _refuse_foreign(target)
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _entered(sole_owner(lock, on_wait), target):
            _sweep(target)
            yield
    except HeldError as held:
        raise BuildError(
            f"Another build is writing {target}.",
            found=str(held),
            expected="one build of an output at a time",
            fix="wait for it to end, which --wait does, or choose another -o",
        ) from None


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, renamed to it at the end and removed on any failure.

    Within `sole_build`. An engine that is there already is replaced only once the new one is whole.

    Raises:
        BuildError: `target` cannot be written to, or is something that is not an engine.
    """
    target = _absolute(target)
    folder = target.with_name(f".{target.name}{_MARK}{secrets.token_hex(8)}")
    with _explained(target):
        _refuse_foreign(target)
        folder.mkdir()
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


def _absolute(target: Path) -> Path:
    """Its one path: every way to it takes the same lock, and what a link leads to is replaced."""
    return Path(os.path.realpath(target))


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"The engine cannot be written to {target}.",
            found=str(error),
            expected="a place that can be written to, on a file system that has locks",
            fix="choose another -o, or free space and permissions there",
        ) from error


@contextmanager
def _entered(context: AbstractContextManager[None], target: Path) -> Iterator[None]:
    """Explains what goes wrong at the entry, and not what does within."""
    with ExitStack() as stack:
        with _explained(target):
            stack.enter_context(context)
        yield


def _refuse_dangling(target: Path) -> None:
    if target.is_symlink() and not target.exists():
        raise _foreign(target, f"a link to {target.readlink()}, where nothing is")


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    is_engine = target.is_dir() and (target / MANIFEST_FILE).exists()
    is_empty = target.is_dir() and not any(target.iterdir())
    if not (is_engine or is_empty):
        kind = "a folder without engine.json" if target.is_dir() else "a file"
        raise _foreign(target, kind)


def _foreign(target: Path, found: str) -> BuildError:
    return BuildError(
        f"{target} exists and is not an engine; it was left alone.",
        found=found,
        expected="a path that does not exist, an empty folder or an engine",
        fix="choose another -o, or remove it yourself",
    )


def _sweep(target: Path) -> None:
    """Clear away what dead builds of `target` left: all there is, as no other has the lock."""
    left = [p for p in target.parent.iterdir() if p.name.startswith(f".{target.name}{_MARK}")]
    for folder in left:
        if folder.name.endswith(_OLD) and not target.exists():
            folder.rename(target)  # the crash came between the two renames
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, target: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)
    if not target.exists():
        folder.rename(target)
        return
    old = folder.with_name(f"{folder.name}{_OLD}")
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
