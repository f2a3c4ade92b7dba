"""A cheap identity of a build's inputs, so that a second build of the same does nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.chat_template import MORE_TEMPLATES

_WHOLE_UP_TO = 1 << 20


def input_files(folders: Iterable[Path]) -> Iterator[Path]:
    """Every file that a build may read of these folders: their own, and further chat templates."""
    for folder in folders:
        for base in (folder, folder / MORE_TEMPLATES):
            if base.is_dir():
                yield from (path for path in sorted(base.iterdir()) if path.is_file())


def fingerprint(paths: Iterable[Path]) -> str:
    """Hex sha256 over the files: their names, and the content or size and time of each.

    A file of at most 1 MiB counts by its content. A larger one counts by size and modification
    time (ns), so it misses exactly one thing: an edit of a large file in place that keeps its size
    and restores its time. On the other side, a large file that was only touched or copied counts as
    another. Where the folders lie and what they are called does not count, but the order in which
    they first appear does, so that two folders with files of the same names can be told apart.

    Raises:
        CheckpointError: a file cannot be read.
    """
    folders: dict[Path, int] = {}
    rows = []
    for path in paths:
        folder = folders.setdefault(path.parent, len(folders))
        rows.append([folder, path.name, *_identity(path)])
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def _identity(path: Path) -> tuple[int, str]:
    try:
        status = path.stat()
        if status.st_size > _WHOLE_UP_TO:
            return status.st_size, f"modified {status.st_mtime_ns}"
        return status.st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read.",
            found=error.strerror or type(error).__name__,
            expected="a readable file",
            fix="check that it exists and its permissions",
        ) from error


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
