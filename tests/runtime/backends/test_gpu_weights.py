"""Weights are read in pieces by a few threads, and come to be where they are bound; no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vlmforge.backends.cuda import gpu_weights
from vlmforge.errors import EngineFormatError

SIZES = [5, 4096, 1, 70_001, 256]


class _Memory:
    def __init__(self, size: int, ordinal: int = 0) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self.address = self.bytes.ctypes.data


class _Event:
    """Copies are done when they are waited for, so that none is waited for too late."""

    def __init__(self, stream: int, ordinal: int) -> None:
        self._copy = _COPIES.pop()

    def wait(self) -> None:
        ctypes.memmove(*self._copy)


_COPIES: list[Any] = []


@pytest.fixture
def _host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def call(function: object, address: int, source: int, size: int, stream: int) -> None:
        _COPIES.append((address, source, size))

    for name, made in (("GpuMemory", _Memory), ("PinnedMemory", _Memory), ("Event", _Event)):
        monkeypatch.setattr(gpu_weights, name, made)
    monkeypatch.setattr(gpu_weights, "call", call)
    monkeypatch.setattr(gpu_weights, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(gpu_weights, "_THREADS", 1)  # what is appended is popped
    yield
    _COPIES.clear()


GPU: Any = SimpleNamespace(ordinal=0, stream=0, enter=lambda: None)


@pytest.mark.usefixtures("_host")
def test_every_byte_comes_to_its_place(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 200_000).astype(np.uint8)
    data.tofile(tmp_path / "w.data")
    places = [(3 + 30_000 * index, size) for index, size in enumerate(SIZES)]
    found = gpu_weights.read_weights(GPU, tmp_path / "w.data", places)
    begin = found[0].address
    assert [(one.address - begin) % 256 for one in found] == [0] * len(places)
    for memory, (offset, size) in zip(found, places, strict=True):
        there = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(memory.address))
        np.testing.assert_array_equal(there, data[offset : offset + size])
    assert list(gpu_weights.read_weights(GPU, tmp_path / "w.data", [])) == []


@pytest.mark.usefixtures("_host")
def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(bytes(5000))
    with pytest.raises(EngineFormatError, match=r"w\.data is shorter") as caught:
        gpu_weights.read_weights(GPU, tmp_path / "w.data", [(0, 100), (4000, 2000)])
    assert (caught.value.found, caught.value.expected) == (
        "nothing at 5000",
        "1000 bytes at 5000",
    )
