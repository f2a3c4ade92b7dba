"""What becomes of threads when the process forks, and when it ends.

A forked child has none of its parent's threads: what waits for one waits for ever. And a thread
that still runs foreign code (a kernel, a tokenizer) while the interpreter is taken down aborts the
process. So whoever starts threads is known here: a child is told that they are gone, and before the
interpreter goes they are ended.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import weakref
from typing import Protocol

from msgspec import Struct


class Owner(Protocol):
    """Has threads."""

    def end(self) -> None:
        """End them, and wait until they have ended: the interpreter is about to go."""

    def abandon(self) -> None:
        """They are gone: this is a forked child. Must not wait for anything."""


class _Process(Struct):
    forks: int = 0


_process = _Process()
_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def watch(owner: Owner) -> None:
    """From now on, `owner` is told of forks and of the end."""
    _owners.add(owner)


def fork_count() -> int:
    """Forks that led to this process. A number that has changed means: this is a child."""
    return _process.forks


def keep_for_ever(thing: object) -> None:
    """Never free `thing`, not even when the interpreter goes.

    For libraries that wait, where they are freed, for threads that a fork has left behind.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _known() -> list[Owner]:
    while True:
        try:
            return list(_owners)
        except RuntimeError:  # another thread has just made one known
            continue


def _forked() -> None:
    _process.forks += 1
    for owner in _known():
        owner.abandon()
    _owners.clear()  # nothing is left to be ended, and a lock of theirs may be held for ever


def _end() -> None:
    ended = list[Owner]()
    while begun := [owner for owner in _known() if owner not in ended]:
        for owner in begun:  # who may leave work to a thread that is not known yet
            owner.end()
        ended += begun


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
