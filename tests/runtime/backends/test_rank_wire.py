"""Ranks that meet: sums and gathers by any number of ranks, and memory that segments share."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import HANGS, wait_until
from sample_manifest import CHAIN
from vlmforge.backends.chained import shared_memory, tensors_of
from vlmforge.backends.ranks import all_gather, all_reduce, processes
from vlmforge.backends.ranks.calls import Write, carry_out
from vlmforge.backends.ranks.processes import Place, Processes, shares
from vlmforge.backends.ranks.serving import Failed
from vlmforge.backends.ranks.wire import Board, Channel, SharedMemory
from vlmforge.engine.chain import ChainStep, Collective, PartChain, Segment
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import RankError


class Patient:
    """Waits for as long as it takes."""

    def wait(self, file: int, event: int) -> None:
        poll = select.poll()
        poll.register(file, event)
        poll.poll()

    def lost(self, rank: int) -> NoReturn:
        raise EOFError(rank)


@contextmanager
def communicators(size: int, room: int) -> Iterator[list[SharedMemory]]:
    """Those of all ranks, in this process."""
    memory = mmap.mmap(-1, Board.bytes_for(size, room))
    pipes = {(a, b): os.pipe() for a in range(size) for b in range(size) if a != b}
    yield [
        SharedMemory(
            rank,
            Board(memory, size, room),
            {o: (pipes[o, rank][0], pipes[rank, o][1]) for o in range(size) if o != rank},
            Patient(),
        )
        for rank in range(size)
    ]
    for end in (end for both in pipes.values() for end in both):
        os.close(end)


def together(ranks: list[SharedMemory], work: Callable[[SharedMemory], None]) -> None:
    """Each rank's work, at the same time."""
    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@given(
    st.integers(2, 4),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_all_get_the_same_sums_in_the_order_of_the_ranks(
    size: int, room: int, shapes: list[tuple[int, int]], seed: int
) -> None:
    """However often they meet, and in however many pieces."""
    draw = np.random.default_rng(seed)
    given_ = [draw.standard_normal((size, *shape), np.float32) for shape in shapes]
    outs = [np.full((size, *shape), np.nan, np.float32) for shape in shapes]

    def work(rank: SharedMemory) -> None:
        for values, out in zip(given_, outs, strict=True):
            all_reduce(rank, values[rank.rank], out[rank.rank])

    with communicators(size, room) as ranks:
        together(ranks, work)
    for values, out in zip(given_, outs, strict=True):
        total = values[0]
        for part in values[1:]:
            total = total + part
        for found in out:
            np.testing.assert_array_equal(found, total)


@given(st.integers(2, 4), st.integers(0, 5), st.integers(1, 6), st.integers(0, 9), st.data())
def test_shares_come_side_by_side_without_what_pads_them(
    size: int, rows: int, width: int, more_room: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, size * width))
    values = np.arange(size * rows * width, dtype=np.float32).reshape(size, rows, 1, width)
    outs = np.full((size, rows, 1, kept), np.nan, np.float32)

    def work(rank: SharedMemory) -> None:
        all_gather(rank, values[rank.rank], None if rank.rank == 0 else outs[0])
        all_gather(rank, values[rank.rank], outs[rank.rank])

    with communicators(size, width + more_room) as ranks:
        together(ranks, work)
    expected = np.concatenate(list(values), axis=-1)[..., :kept]
    for found in outs:
        np.testing.assert_array_equal(found, expected)


def test_who_waits_for_one_that_is_gone_is_told() -> None:
    with communicators(2, 4) as (first, second):
        os.close(second._to[0][1])
        with pytest.raises(EOFError, match="1"):
            first.meet(np.zeros(1, np.float32))
        os.dup2(first._to[0][1], second._to[0][1])  # what is closed at the end


class Talkers(Processes):
    """Ranks that are the other ends of their channels, in this process."""

    def _start(self, room: int) -> None:
        del room
        self.far: dict[int, Channel] = {}
        for rank in range(1, self.size):
            ours, theirs = socket.socketpair()
            self._channels[rank] = Channel(ours, rank, self)
            self.far[rank] = Channel(theirs, 0, Patient())

    def _look(self) -> None:
        """They show no other signs of life."""


def rows(rank: int) -> dict[str, np.ndarray]:
    """More than a socket takes at once."""
    return {"past_key.0": np.full((1, 1 << 17, 4), rank, np.float32)}


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_no_answer_is_lost_whoever_gives_the_first(order: tuple[int, ...]) -> None:
    """All at once, in pieces that come in any order; each rank begins once another has."""
    ranks = Talkers(4, 8)
    begun = {rank: threading.Event() for rank in order}

    def say(at: int) -> None:
        if at:
            begun[order[at - 1]].wait()
        begun[order[at]].set()
        ranks.far[order[at]].send(rows(order[at]))

    speakers = [threading.Thread(target=say, args=(at,), daemon=True) for at in range(3)]
    for speaker in speakers:
        speaker.start()
    answers = ranks.answers()
    assert [answer["past_key.0"].flat[-1] for answer in answers] == [1, 2, 3]
    for rank, answer in enumerate(answers, 1):
        np.testing.assert_array_equal(answer["past_key.0"], rows(rank)["past_key.0"])
    for speaker in speakers:
        speaker.join()
    ranks.close()


def test_an_answer_that_comes_before_it_is_asked_for_is_kept() -> None:
    ranks = Talkers(3, 8)
    ranks.far[2].send({"two": 2})
    end = threading.Thread(target=lambda: ranks.far[1].send({"one": 1}))

    def listen(ready: set[int]) -> None:
        Talkers._listen(ranks, ready)
        if not end.ident:
            end.start()  # not before that of rank 2 was read

    ranks._listen = listen  # type: ignore[method-assign]
    assert ranks.answers() == [{"one": 1}, {"two": 2}]
    end.join()
    ranks.far[2].send(Failed("it had enough"))
    with pytest.raises(RankError) as caught:
        ranks.wait(ranks._channels[1].fileno(), select.POLLIN)
    assert caught.value.found == "rank 2: it had enough"


def test_what_a_rank_says_while_another_is_waited_for_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends: dict[int, socket.socket] = {}

    def stands_in(place: Place) -> subprocess.Popen[bytes]:
        ends[place.rank] = socket.socket(fileno=os.dup(place.channel))
        waits = "import sys; sys.stdin.read()"
        return subprocess.Popen([sys.executable, "-IS", "-c", waits], stdin=subprocess.PIPE)

    monkeypatch.setattr(processes, "_spawn", stands_in)
    monkeypatch.setattr(processes, "_START_S", HANGS)  # they show no signs of life
    ranks = Processes(3, 8)
    waits = threading.Thread(target=ranks.wait_until_loaded, daemon=True)
    waits.start()
    Channel(ends[2], 0, Patient()).send("loaded")  # the first one is waited for
    unread = termios.TIOCOUTQ
    wait_until(lambda: not int.from_bytes(fcntl.ioctl(ends[2], unread, bytes(4)), sys.byteorder))
    Channel(ends[1], 0, Patient()).send("loaded")
    waits.join(HANGS)
    assert not waits.is_alive()
    ranks.close()


@given(st.integers(1, 64), st.integers(1, 9))
def test_threads_are_divided_among_the_ranks(threads: int, size: int) -> None:
    found = shares(threads, size)
    assert len(found) == size
    assert sum(found) == max(threads, size)
    assert max(found) - min(found) <= 1


def test_a_place_is_passed_as_an_argument() -> None:
    place = Place(2, 3, 100, 5, 6, {0: (7, 8), 1: (9, 10)})
    assert Place.parsed(place.dumped()) == place
    assert set(place.files) == {5, 6, 7, 8, 9, 10}


def test_each_rank_writes_its_own_heads() -> None:
    rows = {"past_key.0": np.arange(12.0, dtype=np.float32).reshape(6, 2, 1)}
    written = []

    class Decoder:
        def write(self, place: object, rows: dict[str, np.ndarray], start: int) -> None:
            written.append((place, rows["past_key.0"].ravel().tolist(), start))

    for rank in range(3):
        assert carry_out(Write((4,), rows, 1), Decoder(), rank, 3) is None  # type: ignore[arg-type]
    assert written == [
        ((4,), [4.0 * r, 4.0 * r + 1, 4.0 * r + 2, 4.0 * r + 3], 1) for r in range(3)
    ]


# --- memory ---------------------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> PartChain:
    """Segments that take any of what came before, and a collective after each."""
    made, steps = ["input"], []

    def spec(name: str) -> TensorSpec:
        return TensorSpec(name, "float32", ("batch", 4))

    for index in range(draw(st.integers(1, 8))):
        taken = draw(st.lists(st.sampled_from(made), unique=True, min_size=1))
        given_ = [f"{index}.{i}" for i in range(draw(st.integers(1, 3)))]
        segment = Segment(f"{index}.onnx", tuple(map(spec, taken)), tuple(map(spec, given_)), 0)
        steps.append(ChainStep(segment=segment))
        steps.append(ChainStep(collective=Collective("all_reduce", given_[0], f"{index}.sum")))
        made += [*given_, f"{index}.sum"]
    return PartChain(tuple(steps), None, {})


@given(chains())
def test_no_tensor_is_overwritten_before_its_last_use(chain: PartChain) -> None:
    specs = tensors_of(chain, (TensorSpec("input", "float32", ("batch", 4)),), 2)
    memory = shared_memory(chain, specs)
    assert memory.keys() == specs.keys() - {"input"}
    holds: dict[str, str] = {}
    for step in chain.steps:
        for name in step.taken - {"input"}:
            assert holds[memory[name]] == name
        places = [memory[name] for name in step.given]
        assert len(set(places)) == len(places)
        assert not {memory[name] for name in step.taken - {"input"}} & set(places)
        holds.update(zip(places, step.given, strict=True))


def test_a_long_chain_needs_little_memory() -> None:
    def spec(name: str) -> TensorSpec:
        return TensorSpec(name, "float32", ("batch", 4))

    steps = []
    for i in range(20):
        segment = Segment(
            f"{i}.onnx", (spec(f"sum{i}"), spec(f"h{i}")), (spec(f"part{i}"), spec(f"h{i + 1}")), 0
        )
        steps.append(ChainStep(segment=segment))
        steps.append(ChainStep(collective=Collective("all_reduce", f"part{i}", f"sum{i + 1}")))
    chain = PartChain(tuple(steps), None, {})
    specs = tensors_of(chain, (spec("sum0"), spec("h0")), 2)
    assert len(set(shared_memory(chain, specs).values())) <= 5
    gathered = tensors_of(CHAIN, (), 2)["logits"]
    assert gathered.shape[-1] == 100
