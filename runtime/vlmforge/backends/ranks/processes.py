"""The other ranks of an engine on this host: processes that are started, watched and ended here.

Nothing is left of them: they end with this process, however that ends (`engine.lifeline`), and the
memory in which they meet has no name.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, cast

import msgspec
from msgspec import structs
from typing_extensions import override

from vlmforge import env, limits
from vlmforge.backends import KeyValues, LoadOptions
from vlmforge.backends.ranks.calls import SILENT_S, Call, OtherRanks, no_sign, rank_error
from vlmforge.backends.ranks.guard import Guard
from vlmforge.backends.ranks.serving import Failed, Task
from vlmforge.backends.ranks.wire import Board, Channel, SharedMemory, Watch
from vlmforge.errors import RankError

CHILD = "vlmforge.backends.ranks.child"
LEFT_STATUS = 75  # of a rank that ended because another one had
_LOOK_MS = 100
# A rank that has not loaded its part hangs after so long: its program, and libraries that let no
# thread of it show that it lives meanwhile, are read from a slow disk.
_START_S = 120.0
_SETTLE_S = 1.0  # ranks that end because one has: which was the first is known then
_SETTLE_LOOK_S = 0.01
_groups: weakref.WeakSet[Processes]


class Place(msgspec.Struct, frozen=True):
    """What a rank is, and its descriptors, of which `pipes` are by the rank that they lead to.

    Attributes:
        rank, size, room: See `Communicator`.
    """

    rank: int
    size: int
    room: int
    memory: int
    channel: int
    pipes: dict[int, tuple[int, int]]

    @property
    def files(self) -> tuple[int, ...]:
        """All of them."""
        return (self.memory, self.channel, *(end for ends in self.pipes.values() for end in ends))

    def dumped(self) -> str:
        """As an argument of a program."""
        return json.dumps(msgspec.to_builtins(self))

    @staticmethod
    def parsed(text: str) -> Place:
        """What `dumped` gave."""
        values = json.loads(text)
        pipes = {int(rank): (ends[0], ends[1]) for rank, ends in values.pop("pipes").items()}
        return Place(**values, pipes=pipes)


class Processes(OtherRanks, Watch):
    """Ranks 1 to `size - 1`, one process each."""

    def __init__(self, size: int, room: int) -> None:
        """Start them; they load nothing yet (RankError: the system starts no process)."""
        self.size, self._owner = size, os.getpid()
        self._error: RankError | None = None
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._channels: dict[int, Channel] = {}
        self._pipes: dict[int, tuple[int, int]] = {}
        self._polls: dict[tuple[int, int], select.poll] = {}
        self._communicator: SharedMemory | None = None
        self._seen, self._silent = [0] * size, [0.0] * size
        self._guard, self._loaded, self._losing = Guard(), False, False
        _groups.add(self)
        try:
            self._start(room)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise rank_error(1, size, f"the system starts no process: {error}") from error
            raise

    def _start(self, room: int) -> None:
        size = self.size
        pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
        pipes = {pair: os.pipe() for pair in pairs}  # from a to b: where b reads, where a writes
        ends = [socket.socketpair() for _ in range(1, size)]
        memory = os.memfd_create("vlmforge-ranks")
        os.ftruncate(memory, Board.bytes_for(size, room))

        def leading(rank: int) -> dict[int, tuple[int, int]]:
            others = [other for other in range(size) if other != rank]
            return {other: (pipes[other, rank][0], pipes[rank, other][1]) for other in others}

        try:
            self._pipes = leading(0)
            board = Board(mmap.mmap(memory, 0), size, room)
            for rank, (ours, theirs) in enumerate(ends, 1):
                self._channels[rank] = Channel(ours, rank, self)
                place = Place(rank, size, room, memory, theirs.fileno(), leading(rank))
                self._children[rank] = _spawn(place)
        finally:
            os.close(memory)
            for rank, (_, theirs) in enumerate(ends, 1):
                theirs.close()
                for end in (end for both in leading(rank).values() for end in both):
                    os.close(end)
        self._communicator = SharedMemory(0, board, self._pipes, self)

    @property
    @override
    def over(self) -> bool:
        return self._error is not None

    @override
    def begin(self, folder: Path, options: LoadOptions) -> LoadOptions:
        threads = shares(options.threads or limits.physical_cores(), self.size)
        own = [structs.replace(options, threads=count) for count in threads]
        for rank, channel in self._channels.items():
            channel.send(Task(folder, own[rank], self.communicator.room))
        return own[0]

    @override
    def wait_until_loaded(self) -> None:
        for rank, channel in self._channels.items():
            self._heard(rank, channel)
        self._loaded = True
        self._guard.loaded()

    @property
    @override
    def communicator(self) -> SharedMemory:
        if self._communicator is None:
            raise self._error or rank_error(0, self.size, "it was closed")
        return self._communicator

    @override
    def tell(self, call: Call) -> None:
        self._check()
        for channel in self._channels.values():
            channel.send(call)

    @override
    def answers(self) -> list[KeyValues]:
        return [
            cast("KeyValues", self._heard(rank, channel))
            for rank, channel in self._channels.items()
        ]

    @override
    def give_up(self, error: BaseException) -> None:
        if self._error is None:
            self._error = rank_error(0, self.size, f"{type(error).__name__}: {error}")
        self.close()

    @override
    def close(self) -> None:
        if os.getpid() != self._owner:
            return
        if self._error is None:
            self._error = rank_error(0, self.size, "it was closed")
        self._guard.ring()
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            with suppress(subprocess.TimeoutExpired):  # the kernel is busy with it
                child.wait(_SETTLE_S)
        self.let_go()

    def let_go(self) -> None:
        """Close what leads to them: in a forked child it would outlive the parent."""
        pipes, self._pipes = self._pipes, {}
        channels, self._channels = self._channels, {}
        communicator, self._communicator = self._communicator, None
        self._guard.let_go()
        if communicator is not None:
            communicator.let_go()
        for channel in channels.values():
            channel.close()
        for end in (end for ends in pipes.values() for end in ends):
            os.close(end)
        for child in self._children.values():
            if child.stdin is not None:
                child.stdin.close()

    @override
    def guard(self, alarm: Callable[[], None]) -> None:
        """Also those that hang are found, as nobody else looks while a device is waited for."""
        channels = {rank: channel.fileno() for rank, channel in self._channels.items()}
        self._guard.add(alarm, channels, self.communicator.board)

    @override
    def check(self) -> None:
        self._check()
        poll = select.poll()
        for channel in self._channels.values():
            poll.register(channel.fileno(), select.POLLIN)
        self._listen({found for found, _ in poll.poll(0)})
        if (rank := self._guard.hangs) is not None:
            self._fail(rank, no_sign(SILENT_S))
        if self._guard.rung:  # a rank has gone without a word
            self.lost(self._guard.gone or 0)

    # --- waiting -------------------------------------------------------------------------------

    @override
    def wait(self, file: int, event: int) -> None:
        """See `Watch`. Whoever ends or hangs meanwhile is found out (RankError)."""
        poll = self._polls.get((file, event))
        if poll is None:
            poll = self._polls[file, event] = select.poll()
            for channel in self._channels.values():
                poll.register(channel.fileno(), select.POLLIN)
            poll.register(file, event)
        while file not in (ready := {found for found, _ in poll.poll(_LOOK_MS)}):
            if not ready:
                self._look()
            self._listen(ready)

    @override
    def lost(self, rank: int) -> NoReturn:
        """Say why, as soon as that is known: by its last words, or by how it ended."""
        if not self._losing:
            self._losing = True
            self._listen({channel.fileno() for channel in self._channels.values()})
        found = self._ended()
        for _ in range(round(_SETTLE_S / _SETTLE_LOOK_S)):  # not time: see `_look`
            if found is not None:
                break
            time.sleep(_SETTLE_LOOK_S)
            found = self._ended()
        self._fail(*(found or (rank, "it closed its end of what leads to it")))

    def _ended(self) -> tuple[int, str] | None:
        """A rank that has ended, and not because another had; why."""
        for rank, child in self._children.items():
            status = child.poll()
            if status is not None and status != LEFT_STATUS:
                return rank, _reason(status)
        return None

    def _look(self) -> None:
        """Nobody has moved for a while: is there one who has not shown itself for long?"""
        for rank, count in enumerate(self.communicator.board.beats()):
            if count != self._seen[rank] or rank == 0:
                self._seen[rank], self._silent[rank] = count, 0.0
            else:
                # Looks are counted, not time: while this process stands still, so may all.
                self._silent[rank] += _LOOK_MS / 1000
                begun = self._loaded or _stopped(self._children[rank].pid)
                if self._silent[rank] >= (patience := SILENT_S if begun else _START_S):
                    self._fail(rank, no_sign(patience))

    def _listen(self, ready: set[int]) -> None:
        """A rank has something to say, before it is asked for that, or has ended."""
        self._check()
        for rank, channel in tuple(self._channels.items()):
            while channel.fileno() in ready and channel.take_in():
                for message in channel.come:
                    self._understood(rank, message)

    def _heard(self, rank: int, channel: Channel) -> object:
        self._check()
        return self._understood(rank, channel.receive())

    def _understood(self, rank: int, message: object) -> object:
        if isinstance(message, Failed):
            self._fail(rank, message.reason)
        return message

    def _check(self) -> None:
        if self._error is not None:
            raise RankError.of(self._error)

    def _fail(self, rank: int, reason: str) -> NoReturn:
        if self._error is None:
            self._error = rank_error(rank, self.size, reason)
        self.close()
        raise RankError.of(self._error)


def _spawn(place: Place) -> subprocess.Popen[bytes]:
    """A process of its own program: the caller's is never imported again."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", CHILD, place.dumped()],
        stdin=subprocess.PIPE,  # that it ends with us
        stdout=subprocess.DEVNULL,
        env=env.child_environment(None),
        pass_fds=place.files,
        process_group=0,  # keys that are pressed for us, such as Ctrl-C, are not for it
    )


def _stopped(process: int) -> bool:
    """Whether a signal has stopped it. See proc_pid_stat(5)."""
    with suppress(OSError, IndexError):
        text = Path(f"/proc/{process}/stat").read_text("ascii", "replace")
        return text.rpartition(")")[2].split()[0] in "Tt"
    return False


def _reason(status: int) -> str:
    if status == -signal.SIGKILL:
        return "it was killed by signal 9, which is what the system sends when memory is short"
    if status < 0:
        return f"it was killed by signal {-status}"
    return f"it ended with status {status}"


def shares(threads: int, size: int) -> list[int]:
    """Threads of each rank: as even as they can be, and one at least."""
    return [max(1, threads // size + (rank < threads % size)) for rank in range(size)]


def _forked() -> None:
    for group in list(_groups):
        group.let_go()


_groups = weakref.WeakSet()
os.register_at_fork(after_in_child=_forked)
