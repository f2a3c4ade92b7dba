"""Where GPUs meet, with what the driver does done by the host."""

from __future__ import annotations

import ctypes
import gc
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver

from conftest import HANGS
from host_collectives import HostKernels, aligned
from host_gpus import HostGpu, Seat, Table, all_ranks
from vlmforge.backends import FloatArray
from vlmforge.backends.cuda import meeting, nccl, peers
from vlmforge.backends.cuda.device import SumAndNorm, Tensor
from vlmforge.backends.cuda.meeting import GpuMeetings, meet_first
from vlmforge.backends.fake_meetings import HostMeetings
from vlmforge.backends.ranks import exchange, hindrance
from vlmforge.engine.chain import Collective
from vlmforge.errors import BackendUnavailableError, EngineError, RankError

GOOD = driver.CUresult.CUDA_SUCCESS
SUM = Collective("all_reduce", "a", "b")
GATHER = Collective("all_gather", "a", "b", 7)


class Driver:
    """The driver's calls that `Peers` makes, by their own names and signatures."""

    def __init__(self) -> None:
        self.refused = ""
        self.closed = 0

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("cuMemsetD8Async", "cuIpcGetMemHandle", "cuIpcOpenMemHandle"):
            real, ours = getattr(driver, name), getattr(self, name)
            patch.setattr(driver, name, self._checked(name, real, ours))
        patch.setattr(peers, "free", self._free)
        patch.setattr(peers, "PinnedMemory", Words)
        patch.setattr(peers, "_kernels", lambda gpu, files: HostKernels(gpu.ordinal))
        # A rank whose thread is held up has not failed to come.
        patch.setattr(peers, "PATIENCE_S", int(HANGS))

    def _checked(self, name: str, real: Any, ours: Any) -> Callable[..., Any]:
        def called(*arguments: object) -> Any:
            inspect.signature(real).bind(*arguments)
            if name == self.refused:
                return (driver.CUresult.CUDA_ERROR_NOT_SUPPORTED,)
            return (GOOD, *ours(*arguments))

        return called

    def cuMemsetD8Async(self, at: int, value: int, size: int, _: object) -> tuple[()]:
        ctypes.memset(at, value, size)
        return ()

    def cuIpcGetMemHandle(self, at: int) -> tuple[object]:
        handle = driver.CUipcMemHandle()
        data = at.to_bytes(8, "little").ljust(64, b"\7")
        ctypes.memmove(handle.getPtr(), data, 64)
        return (handle,)

    def cuIpcOpenMemHandle(self, handle: Any, flags: int) -> tuple[object]:
        data = ctypes.string_at(handle.getPtr(), 64)
        assert data.endswith(b"\7") and flags == 1
        return (driver.CUdeviceptr(int.from_bytes(data[:8], "little")),)

    def _free(self, ordinal: int, function: object, handle: object) -> None:
        self.closed += 1


class Words:
    def __init__(self, size: int, ordinal: int) -> None:
        self.bytes = aligned(size)
        self.address = self.bytes.ctypes.data


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    made.patch(monkeypatch)
    monkeypatch.setattr(nccl.Nccl, "made", staticmethod(lambda gpu, ranks: "it is not here"))
    yield made


def tensor(gpu: HostGpu, values: Any) -> Tensor:
    memory = gpu.allocate(values.nbytes)
    gpu.upload(memory.address, values)
    gpu.kept = [*getattr(gpu, "kept", []), memory]  # type: ignore[attr-defined]
    return Tensor("t", "float32", values.shape, memory.address)


def numbers(rank: int, *shape: int) -> FloatArray:
    return np.random.default_rng(rank).standard_normal(shape, np.float32)


def broadcast(gpu: HostGpu, ranks: Seat, place: Any) -> list[int]:
    """What all have of the first one's numbers, whose bits are no numbers as float32."""
    own = [(-1) ** i << i if ranks.rank == 0 else 7 for i in range(62)]
    out = tensor(gpu, np.zeros(62, np.int64))
    given = tensor(gpu, np.array(own, np.int64)) if ranks.rank == 0 else out
    work = place.broadcast(given.address, out.address, 62)
    for _ in range(2):
        work()
    return gpu.download(out.address, (62,), np.dtype(np.int64)).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [2, 3])
def test_gpus_meet_by_our_kernels(gpus: Driver, size: int) -> None:
    def meet(gpu: HostGpu, ranks: Seat) -> tuple[Any, Any]:
        place = meet_first(gpu, ranks, {})  # type: ignore[arg-type]
        given, out = (tensor(gpu, numbers(ranks.rank, 3, 5)) for _ in range(2))
        wide = tensor(gpu, np.zeros((3, 5 * size - 1), np.float32))
        works = [place.bind(SUM, given, out), place.bind(GATHER, given, wide)]
        for work in (*works, *works):
            work()
        said = [broadcast(gpu, ranks, way) for way in (place, HostMeetings(ranks))]
        assert said[0] == said[1] == [(-1) ** i << i for i in range(62)]
        host = HostMeetings(ranks)
        expected = [tensor(gpu, np.zeros(t.shape, np.float32)) for t in (out, wide)]
        for call, target in zip((SUM, GATHER), expected, strict=True):
            host.bind(call, given, target)()
        kind = np.dtype(np.float32)
        pairs = zip((out, wide), expected, strict=True)
        return tuple(
            np.array_equal(*(gpu.download(t.address, t.shape, kind).copy() for t in pair))
            for pair in pairs
        )

    assert all_ranks(size, meet) == [(True, True)] * size
    gc.collect()
    assert gpus.closed == size * (size - 1)


class Summing:
    """In the place of NCCL."""

    def __init__(self, ranks: Seat) -> None:
        self._place = HostMeetings(ranks)

    def all_reduce(self, given: Tensor, out: Tensor) -> Any:
        return self._place.bind(SUM, given, out)


@pytest.mark.parametrize("by", ["ours", "nccl and ours", "nccl, and our norm"])
def test_sums_are_normalised_whatever_makes_them(
    gpus: Driver, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by != "ours":
        monkeypatch.setattr(meeting, "_SMALL", 0)
        monkeypatch.setattr(nccl.Nccl, "made", staticmethod(lambda gpu, ranks: Summing(ranks)))
    if by == "nccl, and our norm":
        gpus.refused = "cuIpcGetMemHandle"

    def meet(gpu: HostGpu, ranks: Seat) -> Any:
        place = meet_first(gpu, ranks, {})  # type: ignore[arg-type]
        given, scale = tensor(gpu, numbers(ranks.rank, 3, 8)), tensor(gpu, numbers(9, 8))
        added, kind = tensor(gpu, numbers(8, 3, 8)), np.dtype(np.float32)
        found = []
        for way in (place, HostMeetings(ranks)):
            out = [tensor(gpu, np.zeros((3, 8), np.float32)) for _ in range(2)]
            way.bind_norm(SumAndNorm(given, added, *out, scale.address, 1e-3))()
            found.append([gpu.download(t.address, t.shape, kind).copy() for t in out])
        for mine, expected in zip(*found, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-5)
        return True

    assert all_ranks(2, meet) == [True, True]


def test_on_processors_memory_that_nobody_wrote_is_summed_without_a_word(gpus: Driver) -> None:
    """As steps that run once at load do."""

    def meet(gpu: HostGpu, ranks: Seat) -> Any:
        place, most = HostMeetings(ranks), np.finfo(np.float32).max
        given = tensor(gpu, np.array([[most, np.inf * (-1) ** ranks.rank, 1, 2]], np.float32))
        out, normed = (tensor(gpu, np.zeros((1, 4), np.float32)) for _ in range(2))
        scale = tensor(gpu, np.ones(4, np.float32))
        works = [
            place.bind(SUM, given, out),
            place.bind_norm(SumAndNorm(given, given, out, normed, scale.address, 1e-3)),
        ]
        for work in works:
            work()
        return gpu.download(out.address, out.shape, np.dtype(np.float32)).copy()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = all_ranks(2, meet)
    for found in answers:
        assert np.isinf(found[0, 0]) and np.isnan(found[0, 1])
        np.testing.assert_array_equal(found[0, 2:], [3, 6])


@pytest.mark.parametrize("refused", ["cuIpcGetMemHandle", "cuIpcOpenMemHandle"])
def test_without_memory_that_all_see_all_know_it(
    gpus: Driver, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus.refused = refused

    def meet(gpu: HostGpu, ranks: Seat) -> object:
        return meet_first(gpu, ranks, {})  # type: ignore[arg-type]

    for error in all_ranks(2, meet):
        assert isinstance(error, BackendUnavailableError)
        assert "NOT_SUPPORTED" in error.found and "it is not here" in error.found
        assert "vlmforge[nccl]" in error.fix
    library = object()
    monkeypatch.setattr(nccl.Nccl, "made", staticmethod(lambda gpu, ranks: library))
    for place in all_ranks(2, meet):
        assert (place._peers, place._nccl) == (None, library)


def test_what_is_lost_on_the_way_is_noticed_at_the_first_meeting(
    gpus: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lossy(HostKernels):
        def launch(self, launch: Any, params: Any, stream: int) -> None:
            super().launch(launch, params, stream)
            ctypes.memset(params.out, 0, 4)

    monkeypatch.setattr(peers, "_kernels", lambda gpu, files: Lossy(gpu.ordinal))
    found = all_ranks(2, lambda gpu, ranks: peers.Peers.made(gpu, ranks, {}))  # type: ignore[arg-type]
    assert found == ["rank 0: what is written there does not arrive"] * 2


def test_who_waits_is_told_when_a_rank_is_lost_and_says_so(gpus: Driver) -> None:
    lost = RankError("Rank 1 of 2 failed", found="gone", expected="all", fix="again")
    apart = threading.Barrier(2, timeout=HANGS)

    def meet(gpu: HostGpu, ranks: Seat) -> object:
        place = meet_first(gpu, ranks, {})  # type: ignore[arg-type]
        apart.wait()
        if ranks.rank == 1:
            return None  # it never comes
        given = tensor(gpu, numbers(0, 2000))
        work = place.bind(SUM, given, given)
        ranks.lost = lost

        def ring() -> None:
            for alarm in ranks.alarms:
                alarm()

        threading.Timer(0.05, ring).start()
        work()
        gpu.wait()
        return None

    error, _ = all_ranks(2, meet)
    assert error is lost


def test_a_rank_that_never_came_is_an_error_too(gpus: Driver) -> None:
    def meet(gpu: HostGpu, ranks: Seat) -> object:
        place = meet_first(gpu, ranks, {})  # type: ignore[arg-type]
        assert place._peers is not None
        gpu.wait()
        place._peers._words.bytes[peers._FAILED] = 1
        with pytest.raises(EngineError, match="do not meet any more") as caught:
            gpu.wait()
        return caught.value.found

    assert all_ranks(2, meet) == ["a rank that did not come to a meeting"] * 2


class Way:
    """One of both ways, by its name."""

    failed, kernels = False, None

    def __init__(self, name: str) -> None:
        self._name = name

    def all_reduce(self, given: Tensor, out: Tensor) -> Any:
        return self._name

    all_gather = all_reduce

    def broadcast(self, given: int, out: int, count: int) -> Any:
        return self._name


@pytest.mark.parametrize("size", [2, 3])
def test_small_tensors_go_by_our_kernels_and_large_sums_by_nccl(size: int) -> None:
    ranks = Seat(Table(size), 0)
    place = GpuMeetings(HostGpu(0), ranks, Way("ours"), Way("nccl"), {})  # type: ignore[arg-type]
    limit = meeting._SMALL
    for call, count, way in (
        (SUM, limit // 2, "ours"),
        (SUM, limit // 2 + 1, "nccl"),
        (GATHER, 1 << 24, "ours"),
    ):
        given = Tensor("a", "float16", (count,), 0)
        assert place.bind(call, given, given) == way  # type: ignore[comparison-overlap]
    assert place.broadcast(0, 0, 1) == "ours"  # type: ignore[arg-type, comparison-overlap]
    alone = GpuMeetings(HostGpu(0), ranks, None, Way("nccl"), {})  # type: ignore[arg-type]
    assert alone.broadcast(0, 0, 1) == "nccl"  # type: ignore[comparison-overlap]


def test_bytes_are_exchanged_in_pieces_and_reasons_by_the_first_that_has_one() -> None:
    def meet(gpu: HostGpu, ranks: Seat) -> object:
        data = bytes([ranks.rank, *range(256)])
        none = hindrance(ranks, "")
        reason = hindrance(ranks, f"no {ranks.rank} é" if ranks.rank else "")
        return exchange(ranks, data) == [bytes([r, *range(256)]) for r in range(3)], none, reason

    assert all_ranks(3, meet) == [(True, "", "rank 1: no 1 é")] * 3
