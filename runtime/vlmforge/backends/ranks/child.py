"""A rank's own program: it loads its part and does what the first rank says, until that is gone."""

from __future__ import annotations

import mmap
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, cast

from typing_extensions import override

from vlmforge.backends.ranks.calls import Call
from vlmforge.backends.ranks.processes import LEFT_STATUS, Place
from vlmforge.backends.ranks.serving import Task, serve
from vlmforge.backends.ranks.wire import Board, Channel, SharedMemory, Watch
from vlmforge.engine.lifeline import end_with_parent

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

    @override
    def guard(self, alarm: Callable[[], None]) -> None:
        """Nothing: this one is ended with the first."""

    @override
    def check(self) -> None:
        """Nothing: see `guard`."""


def joined(place: Place) -> SharedMemory:
    """Where this rank meets the others; it shows that it lives, and ends with the first one."""
    end_with_parent(signal.SIGKILL)
    board = Board(mmap.mmap(place.memory, 0), place.size, place.room)
    threading.Thread(target=_beat, args=(board, place.rank), daemon=True).start()
    return SharedMemory(place.rank, board, place.pipes, _Patience())


def main(place: Place) -> None:
    """Serve there. Never returns: SystemExit when another rank is gone."""
    ranks = joined(place)
    channel = Channel(socket.socket(fileno=place.channel), 0, _Patience())
    task = channel.receive()
    assert isinstance(task, Task)

    def next_call() -> Call:
        return cast("Call", channel.receive())

    serve(task, ranks, channel.send, next_call)
    raise SystemExit(1)


def _beat(board: Board, rank: int) -> None:
    while True:
        board.beat(rank)
        time.sleep(_BEAT_S)


if __name__ == "__main__":
    main(Place.parsed(sys.argv[1]))
