"""Whether ranks of MPI live: the first one asks, a thread of the others answers."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import pytest

from conftest import HANGS, wait_until
from vlmforge.backends.ranks import mpi
from vlmforge.backends.ranks.calls import SILENT_S


class Line:
    """What `mpi.Signs` uses of a communicator of two ranks, one end of it."""

    def __init__(self, here: dict[int, deque[object]], there: dict[int, deque[object]]) -> None:
        self._here, self._there = here, there

    def Get_size(self) -> int:
        return 2

    def iprobe(self, _: int, tag: int) -> bool:
        return bool(self._here[tag])

    def recv(self, source: int, tag: int) -> object:
        del source
        return self._here[tag].popleft()

    def send(self, message: object, _: int, tag: int) -> None:
        self._there[tag].append(message)

    def isend(self, message: object, rank: int, tag: int) -> Any:
        self.send(message, rank, tag)
        return self

    def Wait(self) -> bool:
        return True


@pytest.fixture
def ends() -> tuple[Line, Line]:
    first: dict[int, deque[object]] = defaultdict(deque)
    other: dict[int, deque[object]] = defaultdict(deque)
    return Line(first, other), Line(other, first)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(mpi.time, "monotonic", lambda: now[0])
    return now


def looks(signs: mpi.Signs, clock: list[float], seconds: float) -> int | None:
    """What comes of looking for so long, every twentieth of a second."""
    for _ in range(round(seconds * 20)):
        clock[0] += 0.05
        if (found := signs.look()) is not None:
            return found
    return None


def test_a_rank_that_gives_no_sign_hangs(ends: tuple[Line, Line], clock: list[float]) -> None:
    signs = mpi.Signs(ends[0])  # type: ignore[arg-type]
    assert looks(signs, clock, SILENT_S) is None
    assert looks(signs, clock, 0.1) == 1
    assert not ends[1].recv(0, mpi._ASKED)
    assert not ends[1].iprobe(0, mpi._ASKED)  # it was asked once


def test_one_that_answers_is_asked_again(ends: tuple[Line, Line], clock: list[float]) -> None:
    signs, (_, other) = mpi.Signs(ends[0]), ends  # type: ignore[arg-type]
    for _ in range(5):
        assert looks(signs, clock, SILENT_S - 1) is None
        other.recv(0, mpi._ASKED)
        other.send(None, 0, mpi._SIGN)
    assert looks(signs, clock, SILENT_S + 1) == 1


def test_while_the_first_rank_stands_still_nobody_hangs(
    ends: tuple[Line, Line], clock: list[float]
) -> None:
    signs = mpi.Signs(ends[0])  # type: ignore[arg-type]
    for _ in range(3):
        assert looks(signs, clock, 1.0) is None
        clock[0] += 3600.0
        assert signs.look() is None


def test_a_thread_answers_until_it_ends(
    ends: tuple[Line, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpi, "_ANSWER_S", 0.001)
    first, other = ends
    signs = mpi.Signs(other)  # type: ignore[arg-type]
    signs.begin()
    for _ in range(2):
        first.send(None, 1, mpi._ASKED)
        wait_until(lambda: first.iprobe(1, mpi._SIGN))
        first.recv(1, mpi._SIGN)
    signs.end()
    first.send(None, 1, mpi._ASKED)
    assert other.iprobe(0, mpi._ASKED)
    assert not first.iprobe(1, mpi._SIGN)


def test_before_the_end_all_are_asked_once_more_and_then_no_more(
    ends: tuple[Line, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpi, "_ANSWER_S", 0.001)
    monkeypatch.setattr(mpi, "SILENT_S", HANGS)
    first, other = ends
    signs, answering = mpi.Signs(first), mpi.Signs(other)  # type: ignore[arg-type]
    answering.begin()
    assert signs.settle()
    answering.end()
    assert signs.look() is None
    assert not other.iprobe(0, mpi._ASKED)
    assert not first.iprobe(1, mpi._SIGN)


def test_who_hangs_is_found_before_the_end(
    ends: tuple[Line, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpi, "SILENT_S", 0.01)
    assert not mpi.Signs(ends[0]).settle()  # type: ignore[arg-type]
