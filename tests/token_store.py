"""A stand-in for a decoder: token ids in the place of keys and values, in slots or in blocks.

The next token is a hash of all content that a sequence has in its store, so that a single wrong,
missing or foreign token changes everything after it. What was never written is poison.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vlmforge.kv.blocks import BlockPool
from vlmforge.kv.cache import Copy, Move

VOCAB = 97
POISON = -7


def next_token(content: NDArray[np.int64]) -> int:
    return zlib.crc32(content.astype(np.int64).tobytes()) % VOCAB


def alone(prompt: list[int], count: int) -> list[int]:
    """What a sequence generates when nothing else runs."""
    content = list(prompt)
    for _ in range(count):
        content.append(next_token(np.array(content)))
    return content[len(prompt) :]


def answers_alone(prompt: list[int], count: int, n: int) -> list[list[int]]:
    """`n` answers, each alone. The first token of another one than the first is another one."""
    first, *_ = alone(prompt, 1)
    starts = [(first + number) % VOCAB for number in range(n)]
    return [[start, *alone([*prompt, start], count - 1)] for start in starts]


class Store(Protocol):
    """Where a cache's tokens are."""

    def move(self, moves: Sequence[Move]) -> None:
        """Carry out what the cache asks for."""

    def write(self, place: tuple[int, ...], start: int, ids: Sequence[int]) -> None: ...

    def read(self, place: tuple[int, ...], length: int) -> NDArray[np.int64]: ...


class SlotStore:
    def __init__(self, slots: int, capacity: int) -> None:
        self._tokens = np.full((slots, capacity), POISON, np.int64)

    def move(self, moves: Sequence[Move]) -> None:
        for move in moves:
            if isinstance(move, Copy):
                kept = self._tokens[move.source, : move.tokens].copy()
                self._tokens[move.target, : move.tokens] = kept
            else:
                self._tokens[move.place, move.tokens :] = POISON

    def write(self, place: tuple[int, ...], start: int, ids: Sequence[int]) -> None:
        self._tokens[place[0], start : start + len(ids)] = ids

    def read(self, place: tuple[int, ...], length: int) -> NDArray[np.int64]:
        return self._tokens[place[0], :length]


class BlockStore:
    def __init__(self, cache: BlockPool) -> None:
        self._cache = cache
        self._tokens = np.full((cache.blocks, cache.block_size), POISON, np.int64)

    def move(self, moves: Sequence[Move]) -> None:
        for copy in moves:
            assert isinstance(copy, Copy)
            self._tokens[copy.target] = POISON
            self._tokens[copy.target, : copy.tokens] = self._tokens[copy.source, : copy.tokens]

    def write(self, place: tuple[int, ...], start: int, ids: Sequence[int]) -> None:
        for offset, token in enumerate(ids, start):
            block = place[offset // self._cache.block_size]
            assert self._cache.uses(block) == 1  # what others have is never written to
            self._tokens[block, offset % self._cache.block_size] = token

    def read(self, place: tuple[int, ...], length: int) -> NDArray[np.int64]:
        return self._tokens[list(place)].reshape(-1)[:length]
