"""The kernels in which GPUs meet, compiled for the host: each rank a thread with a copy of them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import HANGS
from host_collectives import HostKernels, aligned, library
from vlmforge.backends.number_formats import decode, encode
from vlmforge_plugins.cached_attention.config import TARGETS
from vlmforge_plugins.cached_attention.kernel_store import newest_target
from vlmforge_plugins.collectives import launcher
from vlmforge_plugins.errors import UnsupportedError

SECOND = 10**9
HALVES = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.float32}


class Ranks:
    """Memory of all ranks, and what they do at the same time."""

    def __init__(self, size: int, patience: int = int(HANGS) * SECOND) -> None:
        self._kernels = [HostKernels(rank) for rank in range(size)]
        self.words = [aligned(128) for _ in range(size)]
        self.lanes = [aligned(launcher.lanes_bytes(size)) for _ in range(size)]
        self._counts = [aligned(launcher.COUNTS_BYTES) for _ in range(size)]
        self.places = [
            launcher.Place(
                rank,
                tuple(lanes.ctypes.data for lanes in self.lanes),
                self._counts[rank].ctypes.data,
                self.words[rank].ctypes.data,
                self.words[rank].ctypes.data + 64,
                patience,
            )
            for rank in range(size)
        ]

    def meet(
        self,
        make: Callable[[int], launcher.Sum | launcher.Gather | launcher.SumNorm],
        ranks: Sequence[int] = (),
    ) -> None:
        def one(rank: int) -> None:
            launcher.run(launcher.launches(make(rank), self.places[rank]), self._kernels[rank], 0)

        threads = [
            threading.Thread(target=one, args=(rank,)) for rank in ranks or range(len(self.places))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def sum(self, numbers: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
        """Of rows, one for each rank; what each rank has got."""
        given = [bits(row, dtype) for row in numbers]
        out = [bits(np.full_like(row, 7), dtype) for row in numbers]
        items = numbers.shape[1]
        self.meet(lambda r: launcher.Sum(given[r].ctypes.data, out[r].ctypes.data, items, dtype))
        return np.stack([numbers_of(got, items, dtype) for got in out])

    def gather(self, numbers: NDArray[np.float32], kept: int, dtype: str) -> NDArray[np.float32]:
        """Of `[ranks, rows, width]`; what each rank has got, `[ranks, rows, kept]`."""
        _, rows, width = numbers.shape
        given = [bits(part, dtype) for part in numbers]
        out = [bits(np.full((rows, kept), 7, np.float32), dtype) for _ in numbers]
        self.meet(
            lambda r: launcher.Gather(
                given[r].ctypes.data, out[r].ctypes.data, rows, width, kept, dtype
            )
        )
        found = [numbers_of(got, rows * kept, dtype).reshape(rows, kept) for got in out]
        return np.stack(found)

    def sum_norm(
        self, numbers: NDArray[np.float32], more: NDArray[np.float32], dtype: str
    ) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Of `[ranks, rows, width]`; the sums with the rows of `more`, and their norms.

        Those of each rank, and last such as one rank makes of the sum.
        """
        *_, rows, width = numbers.shape
        added, scale = bits(more, dtype), bits(SCALE[:width], dtype)
        given = [bits(part, dtype) for part in (*numbers, in_order(numbers, dtype))]
        out = [[bits(np.full_like(more, 7), dtype) for _ in range(2)] for _ in given]

        def asked(kind: type[launcher.N], index: int) -> launcher.N:
            places = (given[index], added, scale, *out[index])
            return kind(*(p.ctypes.data for p in places), rows, width, EPSILON, dtype)

        self.meet(lambda rank: asked(launcher.SumNorm, rank))
        alone = launcher.norm_launches(asked(launcher.Norm, len(numbers)))
        launcher.run(alone, self._kernels[0], 0)
        total, normed = ([numbers_of(o[i], rows * width, dtype) for o in out] for i in (0, 1))
        return list(zip(total, normed, strict=True))


def bits(numbers: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    stored = numbers if dtype == "float32" else encode(numbers, dtype)
    memory = aligned(stored.nbytes + 64)
    memory[:] = 0xA5
    memory[: stored.nbytes] = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    return memory


def numbers_of(memory: NDArray[np.uint8], items: int, dtype: str) -> NDArray[np.float32]:
    """Nothing behind them was written."""
    end = items * launcher.ITEM_BYTES[dtype]
    assert (memory[end:] == 0xA5).all()
    found: NDArray[Any] = memory[:end].view(HALVES[dtype])
    return found.copy() if dtype == "float32" else decode(found, dtype).astype(np.float32)


def drawn(seed: int, *shape: int, dtype: str) -> NDArray[np.float32]:
    return rounded(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def rounded(numbers: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    if dtype == "float32":
        return numbers
    return decode(encode(numbers, dtype), dtype).astype(np.float32)


def in_order(numbers: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    total = numbers[0].copy()
    for row in numbers[1:]:
        total += row
    return rounded(total, dtype)


EPSILON = 1e-3
SCALE = np.linspace(0.5, 1.5, 8192, dtype=np.float32)


def normed(total: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """As numpy has it, of numbers that are rounded already."""
    rows, scale = total.astype(np.float64), SCALE[: total.shape[-1]]
    if dtype != "float32":
        scale = decode(encode(scale, dtype), dtype).astype(np.float32)
    mean = (rows * rows).mean(-1, keepdims=True)
    return (rows / np.sqrt(mean + EPSILON) * scale).astype(np.float32)


# Numbers of a row: fewer than threads, not a multiple of theirs, and as many as there may be.
@settings(max_examples=4)
@example(2, "float16", 1, 8192, 1.0)
@example(2, "bfloat16", 2, 5120, 100.0)
@example(3, "float32", 66, 12, 1e-3)
@example(7, "bfloat16", 1, 5120, 1.0)
@given(
    st.integers(2, 4),
    st.sampled_from(sorted(launcher.ITEM_BYTES)),
    st.integers(1, 64),
    st.integers(16, 1000).map(lambda groups: 4 * groups),
    st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_a_sum_is_added_to_and_normalised(
    size: int, dtype: str, rows: int, width: int, spread: float
) -> None:
    ranks, rows = Ranks(size), max(1, min(rows, 6_000 // width))
    for turn in range(2):
        numbers = rounded(spread * drawn(turn, size, rows, width, dtype=dtype), dtype)
        more = rounded(spread * drawn(turn + 5, rows, width, dtype=dtype), dtype)
        found = ranks.sum_norm(numbers, more, dtype)
        for others in found[1:]:  # all ranks', and those of two kernels one after the other
            for mine, other in zip(found[0], others, strict=True):
                np.testing.assert_array_equal(mine, other)
        total, norm = found[0]
        whole = rounded(in_order(numbers, dtype) + more, dtype)
        np.testing.assert_array_equal(total, whole.reshape(-1))
        step = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-5}[dtype]
        np.testing.assert_allclose(norm, normed(whole, dtype).reshape(-1), rtol=step, atol=1e-6)


def test_rows_of_more_than_one_launch_and_in_place() -> None:
    """Sums of other kinds between them: all blocks count the same meetings."""
    ranks, rows, width = Ranks(2), launcher.BLOCKS + 3, 64
    numbers, more = drawn(1, 2, rows, width, dtype="float16"), np.zeros((rows, width), np.float32)
    scale = bits(SCALE[:width], "float16")
    memory = [bits(part, "float16") for part in numbers]
    nothing, norms = bits(more, "float16"), [bits(more, "float16") for _ in memory]

    def asked(rank: int) -> launcher.SumNorm:
        given, out = memory[rank].ctypes.data, norms[rank].ctypes.data
        places = (given, nothing.ctypes.data, scale.ctypes.data, given, out)
        return launcher.SumNorm(*places, rows, width, EPSILON, "float16")

    for turn in range(3):
        ranks.meet(asked)
        found = [numbers_of(part, rows * width, "float16") for part in memory]
        expected = 2**turn * in_order(numbers, "float16").reshape(-1)
        for total in (*found, *ranks.sum(np.stack(found) / 2, "float16")):
            np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize(("width", "dtype"), [(6, "float16"), (8196, "float16"), (0, "float32")])
def test_rows_that_are_not_normalised_here(width: int, dtype: str) -> None:
    place = launcher.Place(0, (0, 0), 0, 0, 0, 0)
    odd = launcher.SumNorm(0, 0, 0, 0, 0, 3, width, EPSILON, dtype)
    assert not launcher.fits(odd)
    with pytest.raises(UnsupportedError):
        launcher.launches(odd, place)
    with pytest.raises(UnsupportedError):
        launcher.norm_launches(odd)


MEETING = st.tuples(
    st.sampled_from(["sum", "gather"]),
    st.sampled_from(sorted(launcher.ITEM_BYTES)),
    st.integers(1, 3),
    st.sampled_from([1, 3, 4, 6, 250, 1000]),
    st.integers(0, 2),
)


@settings(max_examples=8)
@given(st.integers(2, 4), st.lists(MEETING, min_size=1, max_size=5), st.integers(0, 99))
def test_meetings_one_after_the_other(
    size: int, meetings: list[tuple[str, str, int, int, int]], seed: int
) -> None:
    ranks = Ranks(size)
    for number, (kind, dtype, rows, width, padded) in enumerate(meetings):
        numbers = drawn(seed + number, size, rows, width, dtype=dtype)
        if kind == "sum":
            numbers = numbers.reshape(size, -1)
            expected = in_order(numbers, dtype)
            found = ranks.sum(numbers, dtype)
        else:
            kept = max(1, size * width - padded)
            expected = np.concatenate(numbers, -1)[:, :kept]
            found = ranks.gather(numbers, kept, dtype)
        np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


@pytest.mark.parametrize("kind", ["sum", "gather"])
def test_more_than_one_launch_gives(kind: str) -> None:
    items = launcher.ROOM // 4 + 20_011
    ranks, numbers = Ranks(2), drawn(1, 2, items, dtype="float32")
    for _ in range(2):
        if kind == "sum":
            found = ranks.sum(numbers, "float32")
            np.testing.assert_array_equal(found[1], in_order(numbers, "float32"))
        else:
            found = ranks.gather(numbers[:, None], 2 * items - 1, "float32")[:, 0]
            np.testing.assert_array_equal(found[1], numbers.reshape(-1)[:-1])
        np.testing.assert_array_equal(found[0], found[1])


def test_a_sum_in_place() -> None:
    ranks, numbers = Ranks(2), drawn(2, 2, 999, dtype="float16")
    memory = [bits(row, "float16") for row in numbers]
    place = [array.ctypes.data for array in memory]
    ranks.meet(lambda r: launcher.Sum(place[r], place[r], 999, "float16"))
    for array in memory:
        found = numbers_of(array, 999, "float16")
        np.testing.assert_array_equal(found, in_order(numbers, "float16"))


@pytest.mark.parametrize("told", [True, False], ids=["it is told to stop", "its time is over"])
def test_a_rank_that_does_not_come_is_not_waited_for(told: bool) -> None:
    ranks = Ranks(2, patience=int(HANGS) * SECOND if told else 1)
    if told:
        ranks.words[0][0] = 1
    given = bits(drawn(3, 3000, dtype="float32"), "float32")
    ranks.meet(lambda _: launcher.Sum(given.ctypes.data, given.ctypes.data, 3000, "float32"), [0])
    assert ranks.words[0][64] == 1


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_norm_ends_too_where_a_rank_does_not_come(size: int) -> None:
    ranks, rows, width = Ranks(size, patience=1), 2, 6000
    given, out = (bits(np.zeros((rows, width), np.float32), "float16") for _ in range(2))
    places = [given.ctypes.data] * 4 + [out.ctypes.data]
    made = launcher.SumNorm(*places, rows, width, EPSILON, "float16")
    ranks.meet(lambda _: made, [0])
    assert ranks.words[0][64] == 1


@pytest.mark.parametrize("asked", ["host", "device"])
def test_who_waits_asks_the_host_once_of_sixteen_times(asked: str) -> None:
    """It is far: were all of a rank's threads to look there, the rank would be late by that."""
    ranks, known = Ranks(2, patience=1), library(0)
    here = ranks.places[0]
    threads = 1500  # with a group each
    given = bits(drawn(4, 2 * threads, dtype="float32"), "float32")
    lost = here.counts + launcher.COUNTS_BYTES - 4
    known.vf_watch(ctypes.c_void_p(here.stop if asked == "host" else lost))
    place = given.ctypes.data
    ranks.meet(lambda _: launcher.Sum(place, place, 2 * threads, "float32"), [0])
    # The first thread of all finds at its second look that time is over, all others that it was.
    assert known.vf_looks() == (2 if asked == "host" else 2 * 16 + threads - 1)
    known.vf_watch(None)


def test_what_a_launch_is_told_is_as_the_kernels_read_it() -> None:
    known = library(0)
    assert ctypes.sizeof(launcher.Params) == known.vf_params_size()
    for name, *_ in launcher.Params._fields_:
        offset = getattr(launcher.Params, name).offset
        assert offset == known.vf_params_offset(name.encode()), name
    for name in ("MOST_RANKS", "THREADS", "BLOCKS", "REGION"):
        assert getattr(launcher, name) == known.vf_constant(name.encode())


def test_kernels_of_older_engines_are_told_as_they_were() -> None:
    """Engines carry their kernels: what these read stays where it was."""
    fields = [name for name, *_ in launcher.Params._fields_]
    older = (
        "lanes counts stop failed given out patience items width kept first last share rank size"
    )
    assert fields[: len(older.split())] == older.split()
    assert launcher.Params.size.offset == 8 * 14 + 7 * 4


def test_every_block_of_a_launch_has_something_to_give() -> None:
    """A rank hears from all others in each: only then is a lane free again."""
    place = Ranks(2).places[0]
    for items in (*range(1, 3000, 7), *range(30_000, 270_000, 997)):
        for _, params in launcher.launches(launcher.Sum(0, 0, items, "float32"), place):
            blocks = -(-(params.last - params.first) // params.share)
            assert params.share <= launcher.REGION and blocks <= launcher.BLOCKS


@pytest.mark.parametrize(
    ("ranks", "items", "dtype"), [(9, 8, "float32"), (2, 1 << 31, "float32"), (2, 8, "int32")]
)
def test_what_is_too_much(ranks: int, items: int, dtype: str) -> None:
    place = launcher.Place(0, (0,) * ranks, 0, 0, 0, 0)
    with pytest.raises(UnsupportedError):
        launcher.launches(launcher.Sum(0, 0, items, dtype), place)


def test_a_gpu_gets_the_kernels_of_its_generation() -> None:
    found = [newest_target(TARGETS, capability) for capability in (75, 80, 87, 90, 120)]
    names = [None if target is None else target.name for target in found]
    assert names == [None, "sm_80", "sm_86", "sm_90", "sm_120"]
