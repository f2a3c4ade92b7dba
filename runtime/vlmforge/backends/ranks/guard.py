"""A thread that looks after the ranks while the one that leads them waits for a device."""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections.abc import Callable, Mapping

from vlmforge.backends.ranks.calls import SILENT_S
from vlmforge.backends.ranks.wire import Board

_LOOK_MS = 100


class Guard:
    """Calls alarms when a rank is gone or hangs, and when all end; it does nothing else.

    Attributes:
        gone: A rank that has closed its end of what leads to it, or says that it fails: once it
            has loaded its part, nobody asks it anything.
        hangs: A rank that has given no sign for long.
    """

    def __init__(self) -> None:
        self.gone: int | None = None
        self.hangs: int | None = None
        self._alarms: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._ends: dict[int, int] = {}  # its own descriptors, of which each leads to a rank
        self._over, self._loaded = threading.Event(), False
        self._lock = threading.Lock()

    @property
    def rung(self) -> bool:
        """Whether it has called."""
        return self._over.is_set()

    def add(self, alarm: Callable[[], None], channels: Mapping[int, int], board: Board) -> None:
        """See `Communicator.watch`; `channels` are descriptors by the ranks they lead to."""
        with self._lock:
            self._alarms.append(weakref.WeakMethod(alarm))
        if not (self._ends or self.rung):
            self._ends = {os.dup(file): rank for rank, file in channels.items()}
            ends = dict(self._ends)
            threading.Thread(target=self._look, args=(ends, board), daemon=True).start()

    def loaded(self) -> None:
        """From now on a rank that gives no sign hangs: what libraries do at first may take long."""
        self._loaded = True

    def ring(self) -> None:
        """Call all alarms, once. By any thread."""
        with self._lock:
            first, alarms = not self.rung, tuple(self._alarms)
            self._over.set()
        for alarm in alarms if first else ():
            if (call := alarm()) is not None:
                call()

    def let_go(self) -> None:
        """Close its descriptors; the thread ends."""
        self._over.set()
        ends, self._ends = self._ends, {}
        for end in ends:
            os.close(end)

    def _look(self, ends: Mapping[int, int], board: Board) -> None:
        poll = select.poll()
        for end in ends:
            poll.register(end, 0)  # that the other end is closed is said always
        seen, silent, listens = board.beats(), [0.0] * board.size, False
        while not self.rung:
            if self._loaded and not listens:
                listens = True
                for end in ends:
                    poll.modify(end, select.POLLIN)
            for end, _ in poll.poll(_LOOK_MS):
                if not self.rung:
                    self.gone = ends[end]
            beats = board.beats()
            for rank in range(1, board.size):
                # Looks are counted, not time: while this process stands still, so may all.
                still = self._loaded and beats[rank] == seen[rank]
                silent[rank] = silent[rank] + _LOOK_MS / 1000 if still else 0.0
                if silent[rank] >= SILENT_S:
                    self.hangs = rank
            seen = beats
            if self.gone is not None or self.hangs is not None:
                self.ring()
