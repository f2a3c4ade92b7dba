"""A child process that ends when its parent does, however that came about.

The parent starts it with `stdin=subprocess.PIPE` and writes nothing; the child asks the kernel for
a signal when that pipe is closed, which it is at the latest when the parent is gone.
PR_SET_PDEATHSIG would not do: it follows the thread that started the child, not the process.

Sources: fcntl(2), F_SETOWN, F_SETSIG and O_ASYNC; pipe(7).
"""

from __future__ import annotations

import fcntl
import os
import select
import signal


def end_with_parent(sent: signal.Signals) -> None:
    """Have `sent` sent to this process when the other end of its standard input is closed.

    SIGTERM lets it clear up; SIGKILL reaches a library that never returns to Python.

    Raises:
        OSError: standard input is closed, or a file that does not tell of its end.
    """
    stdin = 0
    fcntl.fcntl(stdin, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(stdin, fcntl.F_SETSIG, sent)
    fcntl.fcntl(stdin, fcntl.F_SETFL, fcntl.fcntl(stdin, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(stdin, 0)  # the end is always reported
    if poll.poll(0):
        os.kill(os.getpid(), sent)  # it came first
