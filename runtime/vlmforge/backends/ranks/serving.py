"""What a rank that is not the first does, whoever carries the words: load its part, and serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from vlmforge.backends import Communicator, LoadOptions, load_backend
from vlmforge.backends.ranks.calls import Call, carry_out
from vlmforge.engine.manifest import load_manifest
from vlmforge.errors import VlmforgeError


class Task(Struct, frozen=True):
    """What a rank is to load.

    Attributes:
        folder: Of the engine.
        options: As all ranks have them, but for the threads.
        room: Of the `Communicator`.
        hosts: Where each rank is; empty: all on one.
    """

    folder: Path
    options: LoadOptions
    room: int
    hosts: tuple[str, ...] = ()


class Loaded(Struct, frozen=True):
    """A rank has loaded its part."""


class Failed(Struct, frozen=True):
    """A rank cannot go on, in words."""

    reason: str


def serve(
    task: Task,
    ranks: Communicator,
    say: Callable[[object], None],
    next_call: Callable[[], Call | None],
) -> bool:
    """Do what the first rank says, until `next_call` gives None; False when that failed."""
    try:
        manifest = load_manifest(task.folder)
        backend = load_backend(manifest.backend)
        decoder = backend.load_rank(task.folder, manifest, task.options, ranks)
        say(Loaded())
        while (call := next_call()) is not None:
            answer = carry_out(call, decoder, ranks.rank, ranks.size)
            if answer is not None:
                say(answer)
    except Exception as error:  # noqa: BLE001 - told to the first rank
        say(Failed(_words(error)))
        return False
    return True


def _words(error: Exception) -> str:
    if isinstance(error, VlmforgeError):
        return f"{error.summary} ({error.found})"
    return f"{type(error).__name__}: {error}"
