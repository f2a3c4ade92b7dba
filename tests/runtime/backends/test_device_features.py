"""Features that lie in a device's memory: what is done with them, and the memory itself."""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from numpy.typing import NDArray
from typing_extensions import override

from sample_manifest import MANIFEST, RICH
from vlmforge.backends.cuda.vision import Piece, Pool
from vlmforge.backends.features import (
    DEVICE_VIEWS,
    VIEW_PATCHES,
    DeviceRows,
    Held,
    Run,
    chosen,
    device_features,
    joined,
)
from vlmforge.engine.images.patches import Patches
from vlmforge.engine.manifest import Manifest, ParallelLayout
from vlmforge.runner.features import FeatureCache
from vlmforge.vl.prepared import PreparedImage

WIDTH = 3


class Kept(Held):
    """Rows whose addresses are numbers, and that count how often they are read."""

    def __init__(self, address: int, values: NDArray[np.float32]) -> None:
        self.address, self.values, self.reads = address, values, 0
        self.row_bytes = 4 * values.shape[1]
        self.size = -(-values.nbytes // 256) * 256

    @override
    def read(self) -> NDArray[np.float32]:
        self.reads += 1
        return self.values.copy()


def drawn(seed: int, count: int) -> tuple[DeviceRows, NDArray[np.float32]]:
    """Rows on a device, and the same as an array."""
    values = np.random.default_rng(seed).random((count, WIDTH), np.float32)
    return DeviceRows((Run(Kept(4096 * seed, values), 0, count),)), values


def copied(rows: DeviceRows) -> list[tuple[int, int]]:
    """Addresses and bytes that a step would copy."""
    return [(run.address, run.nbytes) for run in rows.runs]


@given(st.data())
def test_rows_of_a_device_are_handled_as_those_of_arrays(data: st.DataObject) -> None:
    pairs = [drawn(seed, data.draw(st.integers(1, 9))) for seed in range(3)]
    for _ in range(data.draw(st.integers(1, 6))):
        rows, values = data.draw(st.sampled_from(pairs))
        kind = data.draw(st.sampled_from(("cut", "join", "choose")))
        if kind == "cut":
            start = data.draw(st.integers(0, len(values)))
            stop = data.draw(st.integers(start, len(values) + 2))
            pairs.append((rows[start:stop], values[start:stop]))
        elif kind == "join":
            others = data.draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=3))
            together = joined([rows, *(other for other, _ in others)])
            assert isinstance(together, DeviceRows)
            pairs.append((together, np.concatenate([values, *(v for _, v in others)])))
        elif len(values):
            numbers = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=8))
            picked = chosen(rows, np.array(numbers, np.int64))
            assert isinstance(picked, DeviceRows)
            pairs.append((picked, values[numbers]))
    for rows, values in pairs:
        assert len(rows) == len(values)
        if len(values):
            np.testing.assert_array_equal(np.asarray(rows), values)
        assert sum(size for _, size in copied(rows)) == values.nbytes
        held = {id(run.held): run.held.size for run in rows.runs}
        assert rows.nbytes == sum(held.values())


def test_rows_that_lie_side_by_side_are_copied_at_once() -> None:
    rows, _ = drawn(1, 9)
    assert copied(rows[2:6]) == [(4096 + 2 * 12, 4 * 12)]
    lines = rows.chosen(np.array([4, 5, 6, 0, 8, 7]))
    assert copied(lines) == [(4096 + n * 12, c * 12) for n, c in ((4, 3), (0, 1), (8, 1), (7, 1))]


def test_what_is_partly_on_the_host_is_there_as_a_whole() -> None:
    (rows, values), other = drawn(2, 4), np.ones((2, WIDTH), np.float32)
    together = joined([rows, other])
    assert isinstance(together, np.ndarray)
    np.testing.assert_array_equal(together, np.concatenate([values, other]))
    assert joined([rows]) is rows
    with pytest.raises(ValueError, match="without a copy"):
        np.array(rows, copy=False)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 7), st.integers(0, 50)), max_size=60))
def test_pieces_of_a_pool_never_overlap_and_all_come_back(
    history: list[tuple[bool, int, int]],
) -> None:
    @dataclass(frozen=True)
    class Memory:
        address: int = 1000

    pool, size, held = Pool(Memory(), 40), 40, list[Piece]()

    def places() -> list[tuple[int, int]]:
        return sorted((p.address - 1000, p.address - 1000 + p.size) for p in held)

    for take, wanted, which in history:
        if take:
            assert pool.free == size - sum(piece.size for piece in held)
            gaps = itertools.pairwise([(0, 0), *places(), (size, size)])
            largest = max(after[0] - before[1] for before, after in gaps)
            found = pool.take(wanted)
            assert (found is None) == (largest < wanted)
            held += [] if found is None else [found]
            del found
        elif held:
            del held[which % len(held)]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places()))
        assert all(0 <= begin < end <= size for begin, end in places())
    held.clear()
    assert pool.free == size
    assert pool.take(size) is not None


def image(number: int) -> PreparedImage:
    return PreparedImage(np.full((1, 3, 2, 2), number, np.float32), bytes([number]) * 16)


def test_a_cache_counts_the_memory_that_is_held_and_lets_it_go() -> None:
    made = list[Kept]()

    def encode(pixels: NDArray[np.float32], grid: Any) -> list[DeviceRows]:
        del grid
        values = [np.full((5, WIDTH), view.flat[0], np.float32) for view in pixels]
        made.extend(Kept(i, v) for i, v in enumerate(values))
        return [DeviceRows((Run(kept, 0, 5),)) for kept in made[-len(values) :]]

    cache = FeatureCache(encode, batch=4, budget=600)
    found, _ = cache.get([image(1), image(2), image(3)])
    assert cache.bytes == 512  # two pieces, of which each takes 256 bytes for 60
    assert [kept.reads for kept in made] == [0, 0, 0]
    assert [float(np.asarray(rows)[0, 0]) for rows in found] == [1, 2, 3]
    assert cache.known(image(1).digest) is None
    # No more of those that come next than there is room for, now that their size is known.
    made.clear()
    cache.get([image(4)], [image(5), image(6), image(7)])
    assert len(made) == 2
    # Without room for any, none of them is run before it is needed.
    none = FeatureCache(encode, batch=4, budget=0)
    made.clear()
    none.get([image(1)], [image(2)])
    assert len(made) == 1
    gc.collect()


def on_one_device(**changes: Any) -> Manifest:
    plain = structs.replace(RICH, backend="cuda", parallel=ParallelLayout(1), image=MANIFEST.image)
    return structs.replace(plain, **changes)


def test_the_arithmetic_of_what_images_take() -> None:
    manifest = on_one_device()
    found = device_features(manifest, 1000)
    assert found is not None
    height, width = manifest.image.view_size
    rows = manifest.image.view_rows(manifest.decode.tokens_per_image)
    view = rows * manifest.decode.hidden_size * manifest.decode.feature_layers * 4
    assert found.pixels == DEVICE_VIEWS * height * width * 3 * 4
    assert view <= found.features / DEVICE_VIEWS < view + 256
    assert found.kept == 1000 + 2 * found.features
    assert found.total == found.pixels + found.features + found.kept + found.between
    # Of patches, as many tokens as are run at once, with what is made of them.
    patches = Patches(MANIFEST.image.format, 14, 2, 2, 3136, 12544, (1.0,))
    several, row = device_features(on_one_device(image=patches), 1000), view // rows
    assert several is not None
    tokens = DEVICE_VIEWS * VIEW_PATCHES // 4
    assert (several.pixels, several.features) == (0, 0)
    assert several.kept == 1000 + tokens * (4 * 4 * (3 * 2 * 14 * 14 + 2 * 2) + 3 * row)
    # Several ranks, and parts that are no chain, have them on the host.
    assert device_features(on_one_device(parallel=ParallelLayout(2)), 0) is None
    assert device_features(MANIFEST, 0) is None
