"""The dense cache's memory: touched where tokens are, given back after, whole when rows move."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest

from conftest import resident
from vlmforge.backends import dense
from vlmforge.backends.dense import DenseCache
from vlmforge.backends.rows import Exchange
from vlmforge.engine.manifest import KVLayout
from vlmforge.errors import BackendUnavailableError, SessionError

WIDTH = mmap.PAGESIZE // 64  # 16 tokens of a head are a page of memory, on every machine
LAYOUT = KVLayout(layers=2, kv_heads=3, head_dim=WIDTH, dtype="float32", page_size=None)
ROWS, CAPACITY = 4, 256


def filled() -> tuple[DenseCache, np.ndarray]:
    """A cache with random numbers in it, and the same numbers beside: `[tensor, row, ...]`."""
    cache, rng = DenseCache(LAYOUT, ROWS, CAPACITY), np.random.default_rng(0)
    values = rng.random((4, ROWS, 3, CAPACITY, WIDTH), np.float32)
    for (_, array), given in zip(cache.rows(0, ROWS), values, strict=True):
        array[:] = given
    return cache, values


def content(cache: DenseCache) -> np.ndarray:
    return np.stack([array for _, array in cache.rows(0, ROWS)])


def test_a_copy_moves_what_it_says() -> None:
    cache, values = filled()
    cache.copy(0, 2, 100)
    values[:, 2, :, :100] = values[:, 0, :, :100]
    np.testing.assert_array_equal(content(cache), values)


@pytest.mark.parametrize("tokens", [(77, 77), (77, 20), (0, 77), (256, 3), (0, 0)])
def test_rows_that_change_places_have_each_other_s_tokens(tokens: tuple[int, int]) -> None:
    """And nobody else's are touched; what is behind them is of no use."""
    cache, values = filled()
    first, second = tokens
    cache.exchange(Exchange(1, 3, first, second))
    found = content(cache)
    np.testing.assert_array_equal(found[:, 3, :, :first], values[:, 1, :, :first])
    np.testing.assert_array_equal(found[:, 1, :, :second], values[:, 3, :, :second])
    np.testing.assert_array_equal(found[:, [0, 2]], values[:, [0, 2]])


def test_a_row_that_moves_takes_its_memory_along() -> None:
    wide = KVLayout(layers=1, kv_heads=1, head_dim=1024, dtype="float32", page_size=None)
    cache = DenseCache(wide, 2, 16384)
    ((_, keys), (_, values)) = cache.rows(0, 2)
    keys[1, :, :8192] = values[1, :, :8192] = 1  # 64 MiB
    full = resident()
    cache.exchange(Exchange(0, 1, 0, 8192))
    assert keys[0, 0, 8191, 0] == 1
    assert abs(resident() - full) < 8 << 20


@pytest.mark.parametrize("tokens", [0, 1, 100, 255, 256])
def test_what_is_dropped_goes_back_and_nothing_else_does(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_KEPT_BYTES", 0)
    cache, values = filled()
    cache.drop(1, tokens, CAPACITY)
    found = content(cache)
    if tokens <= 100:  # whole pages are behind them
        assert not found[:, 1, :, tokens + 16 :].any()
    found[:, 1, :, tokens:] = values[:, 1, :, tokens:] = 0  # nobody reads it
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (100, 0), (100, 40), (256, 255)])
def test_what_was_read_is_written_back(tokens: int, start: int) -> None:
    cache, values = filled()
    rows = cache.read(2, tokens)
    assert sorted(rows) == ["past_key.0", "past_key.1", "past_value.0", "past_value.1"]
    cache.copy(1, 2, tokens)  # a copy was read
    assert cache.write(3, rows, start) == tokens
    values[:, 3, :, start:tokens] = values[:, 2, :, start:tokens]
    values[:, 2, :, :tokens] = values[:, 1, :, :tokens]
    np.testing.assert_array_equal(content(cache), values)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: {},
        lambda rows: {**rows, "key.2": rows["past_key.0"]},
        lambda rows: {name: rows[name] for name in rows if name != "past_value.1"},
        lambda rows: {**rows, "past_key.1": rows["past_key.1"][:, :4]},
        lambda rows: {name: array[:2] for name, array in rows.items()},
        lambda rows: {name: array[:, :0] for name, array in rows.items()},
        lambda rows: {name: array[..., :32] for name, array in rows.items()},
        lambda rows: {name: array.astype(np.float16) for name, array in rows.items()},
        lambda rows: {name: np.repeat(array, 90, axis=1) for name, array in rows.items()},
        lambda rows: {name: array[0, 0] for name, array in rows.items()},
    ],
)
def test_rows_of_another_cache_are_refused_before_any_is_written(change: Any) -> None:
    cache, values = filled()
    with pytest.raises(SessionError, match="not of this engine's cache") as caught:
        cache.write(3, change(cache.read(2, 5)), 0)
    assert f"4 tensors: float32 [3, up to 256, {WIDTH}]" in caught.value.expected
    np.testing.assert_array_equal(content(cache), values)


def test_memory_is_used_only_where_tokens_are() -> None:
    wide = KVLayout(layers=1, kv_heads=1, head_dim=1024, dtype="float32", page_size=None)
    before = resident()
    cache = DenseCache(wide, 2, 16384)  # 2 x 128 MiB
    ((_, keys), _) = cache.rows(0, 2)
    empty = resident()
    keys[1, :, :8192] = 1  # 32 MiB
    full = resident()
    cache.drop(1, 0, 8192)
    assert empty - before < 8 << 20
    assert 24 << 20 < full - empty < 48 << 20
    assert resident() - empty < 8 << 20


@pytest.fixture
def kept_pages(monkeypatch: pytest.MonkeyPatch) -> int:
    """So many pages of a row stay, whatever their size; what is kept is meant for 4 KiB."""
    for name in ("_KEPT_BYTES", "_KEPT_IN_ALL"):
        monkeypatch.setattr(dense, name, getattr(dense, name) * mmap.PAGESIZE // 4096)
    return 256


def test_a_little_memory_stays_until_it_is_much(kept_pages: int) -> None:
    """A sequence of a small model is not worth the calls; what stays is known, wherever it goes."""
    cache = DenseCache(LAYOUT, ROWS, 1024)
    whole = np.stack([array for _, array in cache.rows(0, ROWS)])
    del whole
    tokens = kept_pages * 16 // (4 * 3)  # of all heads of all tensors
    few, many = tokens - 64, 2 * tokens

    def there(row: int, tokens: int) -> bool:
        return any(array[row, :, tokens - 32 : tokens].any() for _, array in cache.rows(0, ROWS))

    def write(row: int, tokens: int) -> None:
        for _, array in cache.rows(row, 1):
            array[0, :, :tokens] = 1

    write(0, few)
    cache.drop(0, 0, few)
    assert there(0, few)
    cache.drop(0, 0, 0)
    assert there(0, few)
    write(1, many)
    cache.drop(1, 0, many)
    assert not there(1, many)
    write(2, many)
    cache.drop(2, many - few, many)
    assert there(2, many)
    cache.exchange(Exchange(2, 3, many - few, 0))  # row 2 still holds what was not given back
    assert not there(2, many - few)
    assert not there(2, many)


@pytest.mark.parametrize(("rows", "stays"), [(16, True), (64, False)])
@pytest.mark.usefixtures("kept_pages")
def test_many_rows_keep_little_each(rows: int, stays: bool) -> None:
    cache = DenseCache(LAYOUT, rows, 512)
    for _, array in cache.rows(0, 1):
        array[0, :, :128] = 1  # 96 pages
    cache.drop(0, 0, 128)
    found = np.stack([array[0, :, 32:96] for _, array in cache.rows(0, 1)])
    assert found.any() == stays


def test_address_space_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(dense.mmap, "mmap", refuse)
    with pytest.raises(BackendUnavailableError, match="no address space") as caught:
        DenseCache(LAYOUT, ROWS, CAPACITY)
    assert "max_batch_size" in caught.value.fix
