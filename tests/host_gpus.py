"""Ranks that are threads, each with as much of a GPU as those who meet there ask for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from conftest import HANGS
from vlmforge.backends import Communicator, FloatArray
from vlmforge.backends.fake import HostDevice
from vlmforge.errors import RankError


class Table:
    """Where threads meet."""

    def __init__(self, size: int, room: int = 40) -> None:
        self.size, self.room = size, room
        self.barrier = threading.Barrier(size, timeout=HANGS)
        self.given: list[FloatArray] = [np.zeros(0, np.float32)] * size


class Seat(Communicator):
    def __init__(self, table: Table, rank: int) -> None:
        self.rank, self.size, self.room = rank, table.size, table.room
        self._table = table
        self.alarms: list[Callable[[], None]] = []
        self.lost: RankError | None = None

    def meet(self, values: FloatArray) -> Sequence[FloatArray]:
        assert values.size <= self.room
        self._table.given[self.rank] = values.copy()
        self._table.barrier.wait()
        found = [given.copy() for given in self._table.given]
        self._table.barrier.wait()
        return found

    def watch(self, alarm: Callable[[], None]) -> None:
        self.alarms.append(alarm)

    def check(self) -> None:
        if self.lost is not None:
            raise self.lost


class HostGpu(HostDevice):
    """As much of a `Gpu` as those who meet ask for."""

    def __init__(self, ordinal: int) -> None:
        super().__init__()
        self.ordinal, self.waited = ordinal, lambda: None

    def enter(self) -> None:
        """Every thread has the host's memory."""

    def wait(self) -> None:
        self.waited()

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        found = super().download(address, shape, dtype)
        self.wait()
        return found


def all_ranks(size: int, do: Callable[[HostGpu, Seat], Any]) -> list[Any]:
    """What each rank has to say, or the error that it raised."""
    table, found = Table(size), [None] * size

    def one(rank: int) -> None:
        try:
            found[rank] = do(HostGpu(rank), Seat(table, rank))
        except Exception as error:  # noqa: BLE001 - shown by the test
            found[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
