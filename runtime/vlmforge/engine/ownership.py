"""The sole right to write something: a lock that lives exactly as long as the process that has it.

A process id is no sign of life: containers do not see each other's, and in each of them they begin
at 1 again. A lock of flock(2) belongs to an open file; the kernel drops it when the process ends,
however that was, and every container that shares the disk sees it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

_POLL_S = 0.2


class HeldError(Exception):
    """Somebody else has the lock; the text names who, as far as it is known."""


@contextmanager
def sole_owner(path: Path, on_wait: Callable[[str], None] | None) -> Iterator[None]:
    """Hold the lock `path`, a file that is there only while somebody has it or waits for it.

    Args:
        path: Its folder must exist. A file that a dead process left behind is no hindrance.
        on_wait: Gets the holder's name once if there is one; the lock is then waited for.
            None: never wait.

    Raises:
        HeldError: another has it, and `on_wait` is None.
        OSError: the file cannot be written, or its file system has no locks.
    """
    # No fallback: it takes a process id for the sign of life where the file system has no locks.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if on_wait is None:
            raise HeldError(_holder(path)) from None
        on_wait(_holder(path))
        lock.acquire(poll_interval=_POLL_S)
    try:
        path.write_text(_me(), "utf-8")
        yield
    finally:
        # While it is held: those who wait see that the file is gone and begin with a new one.
        path.unlink(missing_ok=True)
        lock.release()


def _me() -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"process {os.getpid()} on {socket.gethostname()}, since {now}"


def _holder(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip() or "a process that just began"
    except OSError:
        return "a process of another user"
