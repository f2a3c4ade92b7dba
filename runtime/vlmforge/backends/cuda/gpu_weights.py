"""Weights from a file to a GPU's memory: a few threads read pieces, which are copied meanwhile."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda.bindings import driver
from msgspec import Struct

from vlmforge.backends.cuda.device import Memory
from vlmforge.backends.cuda.gpu import Event, Gpu, GpuMemory, PinnedMemory
from vlmforge.errors import EngineFormatError
from vlmforge_plugins.cached_attention.driver import call

# Two pieces a thread: one is read while the other is copied.
_PIECE_BYTES, _THREADS, _PIECES = 1 << 23, 6, 2
_ALIGNMENT = 256


class _Within(Struct, frozen=True):
    """See `Memory`. A piece of what is allocated as one."""

    address: int
    whole: GpuMemory


class _Copy(Struct, frozen=True):
    """From where in the file to which address."""

    offset: int
    size: int
    address: int


def read_weights(gpu: Gpu, file: Path, places: Sequence[tuple[int, int]]) -> Sequence[Memory]:
    """See `Device.weights`. They are there when this returns."""
    if not places:
        return ()
    sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for _, size in places]
    whole = GpuMemory(sum(sizes), gpu.ordinal)
    begins = itertools.accumulate(sizes[:-1], initial=whole.address)
    copies = [_Copy(*place, begin) for place, begin in zip(places, begins, strict=True)]
    pieces = [piece for copy in copies for piece in _pieces(copy)]
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            shares = [pieces[first::_THREADS] for first in range(_THREADS)]
            running = [pool.submit(_send, gpu, file, descriptor, share) for share in shares]
        for done in running:
            done.result()
    finally:
        os.close(descriptor)
    return [_Within(copy.address, whole) for copy in copies]


def _pieces(copy: _Copy) -> Iterator[_Copy]:
    for at in range(0, copy.size, _PIECE_BYTES):
        size = min(_PIECE_BYTES, copy.size - at)
        yield _Copy(copy.offset + at, size, copy.address + at)


def _send(gpu: Gpu, file: Path, descriptor: int, pieces: Sequence[_Copy]) -> None:
    """In a thread of its own."""
    gpu.enter()
    staging = [PinnedMemory(_PIECE_BYTES, gpu.ordinal) for _ in pieces[:_PIECES]]
    sent: list[Event | None] = [None] * len(staging)
    try:
        for number, piece in enumerate(pieces):
            turn = number % _PIECES
            if (event := sent[turn]) is not None:
                event.wait()
            _read(file, descriptor, piece, staging[turn].bytes.data)
            source = staging[turn].address
            call(driver.cuMemcpyHtoDAsync, piece.address, source, piece.size, gpu.stream)
            sent[turn] = Event(gpu.stream, gpu.ordinal)
    finally:  # what is copied from is not given back before
        for event in sent:
            if event is not None:
                event.wait()


def _read(file: Path, descriptor: int, piece: _Copy, into: memoryview) -> None:
    done = 0
    while done < piece.size:
        found = os.preadv(descriptor, [into[done : piece.size]], piece.offset + done)
        if not found:
            raise EngineFormatError(
                f"{file.name} is shorter than its weights.",
                found=f"nothing at {piece.offset + done}",
                expected=f"{piece.size} bytes at {piece.offset}",
                fix="build the engine again with build-engine",
            )
        done += found
