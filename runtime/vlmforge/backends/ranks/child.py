"""A rank's own program: it loads its part and does what the first rank says, until that is gone."""

from __future__ import annotations

import mmap
import select
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

from typing_extensions import override

from vlmforge.backends import DecoderSession, load_backend
from vlmforge.backends.ranks.calls import Call, carry_out
from vlmforge.backends.ranks.processes import LEFT_STATUS, Failed, Loaded, Place, Task
from vlmforge.backends.ranks.wire import Board, Channel, SharedMemory, Watch
from vlmforge.engine.lifeline import end_with_parent
from vlmforge.engine.manifest import load_manifest
from vlmforge.errors import VlmforgeError

_BEAT_S = 0.2


class _Patience(Watch):
    """A rank waits for as long as it lives: the first one sees to that nobody waits in vain."""

    def __init__(self) -> None:
        self._polls: dict[tuple[int, int], select.poll] = {}

    @override
    def wait(self, file: int, event: int) -> None:
        poll = self._polls.get((file, event))
        if poll is None:
            poll = self._polls[file, event] = select.poll()
            poll.register(file, event)
        poll.poll()

    @override
    def lost(self, rank: int) -> NoReturn:
        raise SystemExit(LEFT_STATUS)


def main(place: Place) -> None:
    """Serve there. Never returns: SystemExit when another rank is gone."""
    end_with_parent(signal.SIGKILL)
    board = Board(mmap.mmap(place.memory, 0), place.size, place.room)
    threading.Thread(target=_beat, args=(board, place.rank), daemon=True).start()
    channel = Channel(socket.socket(fileno=place.channel), 0, watch := _Patience())
    try:
        task = channel.receive()
        assert isinstance(task, Task)
        decoder = _load(task, SharedMemory(place.rank, board, place.pipes, watch))
        channel.send(Loaded())
        while True:
            call: Call = channel.receive()  # type: ignore[assignment]
            answer = carry_out(call, decoder, place.rank, place.size)
            if answer is not None:
                channel.send(answer)
    except Exception as error:  # noqa: BLE001 - told to the first rank
        channel.send(Failed(_words(error)))
        raise SystemExit(1) from None


def _load(task: Task, ranks: SharedMemory) -> DecoderSession:
    manifest = load_manifest(task.folder)
    return load_backend(manifest.backend).load_rank(task.folder, manifest, task.options, ranks)


def _beat(board: Board, rank: int) -> None:
    while True:
        board.beat(rank)
        time.sleep(_BEAT_S)


def _words(error: Exception) -> str:
    if isinstance(error, VlmforgeError):
        return f"{error.summary} ({error.found})"
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(Place.parsed(sys.argv[1]))
