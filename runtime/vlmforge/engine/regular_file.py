"""Files of an engine, read as what they must be: regular, and no larger than is sane.

A device or a pipe under an expected name would block, or never end.
"""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def regular_size(path: Path) -> int:
    """Size of a regular file in bytes (OSError otherwise; links are followed)."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return status.st_size


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes (OSError otherwise)."""
    size = regular_size(path)
    if size > most:
        raise OSError(errno.EFBIG, f"{size} bytes, at most {most} are read")
    with path.open("rb") as file:
        return file.read(most)
