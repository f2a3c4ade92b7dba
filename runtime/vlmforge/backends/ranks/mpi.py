"""Ranks that mpirun has started, on one host or on several: all run one and the same program.

On the first, `pipeline()` returns as ever. On the others it never does: they serve the first one's
pipelines, one after the other, and end with it. A rank that is killed ends all of them: that is
what mpirun does. What a rank can say itself, it says to the first one. While that waits, it asks
the others for a sign that they live, which a thread of theirs gives whatever they calculate: one
that gives none hangs.

Waiting is by looking, more and more seldom: MPI's own would keep a processor busy for as long as
nobody asks anything.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
from msgspec import Struct, structs
from typing_extensions import override

from vlmforge import limits
from vlmforge.backends import Communicator, FloatArray, KeyValues, LoadOptions
from vlmforge.backends.ranks.calls import (
    SILENT_S,
    Call,
    OtherRanks,
    no_sign,
    rank_error,
)
from vlmforge.backends.ranks.serving import Failed, Task, serve
from vlmforge.errors import BackendUnavailableError, ConfigError, PipelineError, RankError

if TYPE_CHECKING:
    from mpi4py import MPI

_TOLD, _SAID, _FAILED = 1, 2, 3  # tags: the first rank's words, the others', and their last
_ASKED, _SIGN = 4, 5  # tags: whether a rank lives, and that it does
_ANSWER_S = 0.1  # how often a rank looks whether it was asked that
_STEP_S = 0.1  # of one look at most: while this process stands still, so may all
_LOOKS = 200  # before the first pause
_PAUSE_S, _LONGEST_S = 2e-5, 1e-3


class Closed(Struct, frozen=True):
    """The pipeline is closed: wait for the next one."""


class Ended(Struct, frozen=True):
    """The first rank's program ends."""


class Memory(Struct, frozen=True):
    """Say on which host you are, and how many bytes you may take there."""


class Signs:
    """Whether the other ranks live. On the first they are asked, on the others they answer."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm, self._over = comm, threading.Event()
        self._asked: dict[int, Any] = {}  # what was sent to those that have not answered
        self._silent = [0.0] * comm.Get_size()
        self._looked, self._asks = time.monotonic(), True
        self._thread = threading.Thread(target=self._answer, daemon=True)

    def look(self) -> int | None:
        """Ask who is not asked; a rank that gives no sign for long, or None. On the first rank."""
        now = time.monotonic()
        step, self._looked = min(now - self._looked, _STEP_S), now
        for rank in range(1, len(self._silent)):
            if self._comm.iprobe(rank, _SIGN):
                self._comm.recv(source=rank, tag=_SIGN)
                self._silent[rank] = 0.0
                self._asked.pop(rank).Wait()
            elif rank in self._asked:
                self._silent[rank] += step
            if self._asks and rank not in self._asked:
                self._asked[rank] = self._comm.isend(None, rank, _ASKED)
            if self._silent[rank] >= SILENT_S:
                return rank
        return None

    def settle(self) -> bool:
        """Whether all live, asked for the last time: MPI cannot end while words are on the way."""
        self.look()
        self._asks = False
        while self._asked:
            if self.look() is not None:
                return False
            time.sleep(_LONGEST_S)
        return True

    def begin(self) -> None:
        """Answer from now on. On the other ranks."""
        self._thread.start()

    def end(self) -> None:
        """Use MPI no more."""
        self._over.set()
        self._thread.join()

    def _answer(self) -> None:
        while not self._over.wait(_ANSWER_S):
            while self._comm.iprobe(0, _ASKED):
                self._comm.recv(source=0, tag=_ASKED)
                self._comm.send(None, 0, _SIGN)


class World:
    """All processes of this mpirun.

    Attributes:
        rank, size: Of this one, and how many there are.
        leads: The pipeline that is open on the first rank, or None.
        hangs: Whether a rank has given no sign for long: the program can only be ended.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm, self._owner = comm, os.getpid()
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.leads: MpiRanks | None = None
        self.hangs = False
        self._signs = Signs(comm)
        if self.rank > 0:
            self._signs.begin()
        atexit.register(self._end if self.rank == 0 else self._signs.end)

    def tell(self, message: object) -> None:
        """From the first rank to all others."""
        sent = [self._comm.isend(message, rank, _TOLD) for rank in range(1, self.size)]
        for request in sent:
            self._until(lambda request=request: request.Test())  # type: ignore[misc]

    def say(self, message: object) -> None:
        """From another rank to the first."""
        tag = _FAILED if isinstance(message, Failed) else _SAID
        request = self._comm.isend(message, 0, tag)
        self._until(request.Test)

    def told(self) -> object:
        """What the first rank tells this one."""
        return self._next(0, _TOLD)

    def said(self, rank: int) -> Any:
        """What another rank says to the first."""
        return self._next(rank, _SAID)

    def meet(self, values: FloatArray, out: FloatArray) -> None:
        """All ranks' `values` `[n]` into `out` `[size, n]`."""
        request = self._comm.Iallgather(values, out)
        self._until(request.Test)

    def room(self) -> float:
        """Bytes that all ranks may take in all, if each takes as much as the others."""
        hosts: dict[str, list[int]] = {}
        for name, free in self.memory():
            hosts.setdefault(name, []).append(free)
        return self.size * min(min(found) / len(found) for found in hosts.values())

    def memory(self) -> list[tuple[str, int]]:
        """Each rank's host, and bytes that it may take there."""
        self.tell(Memory())
        return [_memory(), *(self.said(rank) for rank in range(1, self.size))]

    def serve(self) -> NoReturn:
        """What a rank that is not the first does instead of returning from `pipeline()`."""
        while not isinstance(message := self.told(), Ended):
            if isinstance(message, Memory):
                self.say(_memory())
            elif isinstance(message, Task):
                self._serve_one(message)
        raise SystemExit(0)

    def _serve_one(self, task: Task) -> None:
        task = structs.replace(task, options=own_options(task))
        serve(task, MpiMeetings(self, task.room), self.say, self._calls())

    def _calls(self) -> Callable[[], Call | None]:
        def call() -> Call | None:
            message = self.told()
            return None if isinstance(message, Closed) else cast("Call", message)

        return call

    def _next(self, rank: int, tag: int) -> Any:
        self._until(lambda: self._comm.iprobe(rank, tag))
        return self._comm.recv(source=rank, tag=tag)

    def _until(self, holds: Callable[[], bool]) -> None:
        """Look again and again, and for what another rank says unasked."""
        looks, pause = 0, _PAUSE_S
        while not holds():
            looks += 1
            if looks < _LOOKS:
                os.sched_yield()
                continue
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_S)
            if self.rank == 0 and (found := self._failure()) is not None:
                self._fail(*found)

    def _failure(self) -> tuple[int, str] | None:
        """A rank that has said that it failed, or hangs, and why; None: there is none."""
        for rank in range(1, self.size):
            if self.leads is not None and self._comm.iprobe(rank, _FAILED):
                return rank, self._comm.recv(source=rank, tag=_FAILED).reason
        if (silent := self._signs.look()) is None:
            return None
        self.hangs = True
        return silent, no_sign(SILENT_S)

    def _fail(self, rank: int, reason: str) -> NoReturn:
        error = rank_error(rank, self.size, reason)
        if self.leads is not None:
            self.leads.failed(error)
        raise error

    def _end(self) -> None:
        """The interpreter ends. Ranks that are in the middle of something cannot be told so."""
        if os.getpid() != self._owner:
            return
        broken = self.hangs or (self.leads is not None and self.leads.broken)
        if broken or not self._close() or not self._signs.settle():
            self._comm.Abort(1)
        self.tell(Ended())

    def _close(self) -> bool:
        """Close the pipeline that is open still; False: a rank has failed meanwhile."""
        try:
            if self.leads is not None:
                self.leads.close()
        except RankError:
            return False
        return True


class MpiMeetings(Communicator):
    """Meetings of all ranks of a `World`."""

    def __init__(self, world: World, room: int) -> None:
        self.rank, self.size, self.room = world.rank, world.size, room
        self._world = world
        self._given = np.zeros(world.size * room, np.float32)

    @override
    def check(self) -> None:
        """Nothing: whoever waits here finds it out, and no device waits for ranks of mpirun."""

    @override
    def meet(self, values: FloatArray) -> Sequence[FloatArray]:
        given = self._given[: self.size * values.size].reshape(self.size, -1)
        self._world.meet(np.ascontiguousarray(values), given)
        return list(given)


class MpiRanks(OtherRanks):
    """The others, for one pipeline of the first."""

    def __init__(self, world: World, room: int) -> None:
        if world.leads is not None and world.leads.broken:
            raise rank_error(0, world.size, "one of them failed before; start the program again")
        if world.leads is not None:
            raise PipelineError(
                "Ranks of mpirun serve one pipeline at a time.",
                found="a second pipeline, and the first is not closed",
                expected="one, whose ranks are those that mpirun has started",
                fix="close the first one, or leave communicator='mpi' out",
            )
        self._world, self._owner = world, os.getpid()
        self._error: RankError | None = None
        self._loaded = self._closed = False
        self._meetings = MpiMeetings(world, room)
        world.leads = self

    @property
    def broken(self) -> bool:
        """Whether a rank failed since all had loaded, for which others wait, or one hangs."""
        return self._world.hangs or (self._loaded and self._error is not None)

    @property
    @override
    def over(self) -> bool:
        return self._error is not None

    @override
    def begin(self, folder: Path, options: LoadOptions) -> LoadOptions:
        hosts = tuple(name for name, _ in self._world.memory())
        task = Task(folder.resolve(), options, self._meetings.room, hosts)
        self._world.tell(task)
        return own_options(task)

    @override
    def wait_until_loaded(self) -> None:
        for rank in range(1, self._world.size):
            self._world.said(rank)
        self._loaded = True

    @property
    @override
    def communicator(self) -> MpiMeetings:
        return self._meetings

    @override
    def tell(self, call: Call) -> None:
        self._check()
        self._world.tell(call)

    @override
    def answers(self) -> list[KeyValues]:
        ranks = range(1, self._world.size)
        return [cast("KeyValues", self._world.said(rank)) for rank in ranks]

    def failed(self, error: RankError) -> NoReturn:
        """Another rank has failed, and with it all that the first one waits for."""
        self._error = error
        raise RankError.of(error)

    @override
    def give_up(self, error: BaseException) -> None:
        if self._error is None:
            self._error = rank_error(0, self._world.size, f"{type(error).__name__}: {error}")

    @override
    def close(self) -> None:
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        if self.broken:  # and so will it be: no other pipeline can be made
            return
        self._world.leads = None
        self._world.tell(Closed())
        self.give_up(PipelineError("it was closed"))

    def _check(self) -> None:
        if self._error is not None:
            raise RankError.of(self._error)


@cache
def world(ranks: int) -> World:
    """That of this process, of so many ranks; MPI begins with the first call.

    Raises:
        BackendUnavailableError: mpi4py or an MPI library is not installed, or that library lets
            one thread alone use it.
        ConfigError: mpirun has not started this program, or in another number.
    """
    try:
        from mpi4py import MPI  # it begins MPI, and is an extra
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailableError(
            "MPI is not installed here.",
            found=str(error),
            expected="mpi4py, and the library of MPI whose mpirun is used",
            fix="pip install 'vlmforge[tp]' mpich",
        ) from error
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise BackendUnavailableError(
            "This MPI is for one thread at a time, and a rank shows from a second that it lives.",
            found=f"thread level {MPI.Query_thread()}",
            expected=f"{MPI.THREAD_MULTIPLE} (MPI_THREAD_MULTIPLE), which mpi4py asks for",
            fix="leave mpi4py.rc as it is; with another library: pip install mpich",
        )
    size = MPI.COMM_WORLD.Get_size()
    if size != ranks:
        raise ConfigError(
            "communicator='mpi' takes the processes that mpirun has started for ranks.",
            found=f"tp={ranks} in a program that was started {size} times",
            expected="as many processes as ranks",
            fix=f"mpirun -n {ranks} python app.py, or leave communicator='mpi' out",
        )
    return World(MPI.COMM_WORLD)


def own_options(task: Task) -> LoadOptions:
    """Of this process: its share of the threads, or of the cores of its host."""
    host, _ = _memory()
    threads = task.options.threads or limits.physical_cores()
    beside = len(task.hosts) if task.options.threads else task.hosts.count(host)
    return structs.replace(task.options, threads=max(1, threads // beside))


def _memory() -> tuple[str, int]:
    return os.uname().nodename, limits.available_memory().bytes
