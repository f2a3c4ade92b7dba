"""A file of named arrays and one JSON text: whole or not there, and never anything that runs.

It is a NumPy archive (`.npz`), not compressed, so that other programs can read it too. Each member
has a checksum, and all of them are compared before anything is given out.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from vlmforge.engine.regular_file import regular_size
from vlmforge.errors import SessionError

Arrays = Mapping[str, NDArray[Any]]

_TEXT = "record"
_SUFFIX = ".npy"
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,  # a compression or an encryption that Python does not have
    RuntimeError,
    ValueError,
    TypeError,
    SyntaxError,
    KeyError,
    IndexError,
    EOFError,
    MemoryError,
    OverflowError,
)


def write_arrays(path: Path, text: str, arrays: Arrays) -> None:
    """Write the file beside its place and then put it there, over one of that name.

    Raises:
        SessionError: it cannot be written; what was there is as it was.
    """
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name[:50]}.", suffix=".part", delete=False
        ) as file:
            beside = Path(file.name)
            try:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                    content = {_TEXT: np.frombuffer(text.encode("utf-8"), np.uint8), **arrays}
                    for name, array in content.items():
                        with archive.open(name + _SUFFIX, "w", force_zip64=True) as member:
                            npy.write_array(member, np.asarray(array), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
                beside.replace(path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
    except (OSError, ValueError) as error:  # of a path with NUL too
        raise SessionError(
            f"{path} cannot be written.",
            found=getattr(error, "strerror", None) or str(error),
            expected="a path in a folder that can be written to, and room on its disk",
            fix="make the folder, or give another path",
        ) from error


def read_arrays(path: Path) -> tuple[str, Arrays]:
    """The text and the arrays that `write_arrays` was given.

    Raises:
        SessionError: there is no such file, or it is not whole.
    """
    try:
        size = regular_size(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_honest(members, size)
            found = {member.filename: _array(archive, member) for member in members}
        text = bytes(found.pop(_TEXT + _SUFFIX)).decode("utf-8")
        return text, {name.removesuffix(_SUFFIX): array for name, array in found.items()}
    except OSError as error:
        raise SessionError(
            f"{path} cannot be read.",
            found=error.strerror or str(error),
            expected="a file that session.save(path) wrote",
            fix="check the path",
        ) from error
    except _BROKEN as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def damaged(path: Path, found: str) -> SessionError:
    """That a file is not what was written."""
    return SessionError(
        f"{path} is not a whole saved session.",
        found=found[:200],
        expected="the file that session.save(path) wrote, byte for byte",
        fix="copy the file again; if it is lost, ask the conversation anew",
    )


def _check_honest(members: list[zipfile.ZipInfo], size: int) -> None:
    """No more may come out than is there: such a file could fill the memory."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a compressed member")
    if sum(member.file_size for member in members) > size:
        raise ValueError("members that are longer than the file")
    if len({member.filename for member in members}) != len(members):
        raise ValueError("a member that is there twice")


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        array: NDArray[Any] = npy.read_array(file, allow_pickle=False)
        if file.read(1):  # and the checksum has been compared
            raise ValueError(f"bytes behind the end of {member.filename}")
    return array
