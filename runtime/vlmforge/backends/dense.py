"""A dense key/value cache in this process's memory: touched where tokens are, given back after."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence

import numpy as np

from vlmforge.backends import DecoderBatch, FloatArray, KeyValues
from vlmforge.backends.rows import Exchange, Order, Rows
from vlmforge.engine.interface import cache_names
from vlmforge.engine.manifest import KVLayout
from vlmforge.errors import BackendUnavailableError, SessionError
from vlmforge.kv.cache import Copy, Move

# So much of a row stays touched when its tokens go, and of all rows: to give a few pages back, and
# to be given others by the next tokens, costs a small model more than its steps do.
_KEPT_BYTES, _KEPT_IN_ALL = 2 << 20, 16 << 20


class DenseCache:
    """Per layer, keys and values float32 `[rows, kv_heads, capacity, head_dim]`."""

    def __init__(self, kv: KVLayout, rows: int, capacity: int) -> None:
        self._shape = (rows, kv.kv_heads, capacity, kv.head_dim)
        names = cache_names(kv)
        # As long as a row of one tensor, but only as much of it is touched as is used.
        self._scratch = np.empty(math.prod(self._shape[1:]), np.float32)
        self._memory = {name: _lazy_memory(math.prod(self._shape) * 4) for name in names}
        self._arrays = {
            name: np.frombuffer(memory, np.float32).reshape(self._shape)
            for name, memory in self._memory.items()
        }
        self._kept = min(_KEPT_BYTES, _KEPT_IN_ALL // rows)
        self._touched = [0] * rows  # tokens whose memory may be there although they are gone

    def rows(self, first: int, count: int) -> Iterator[tuple[str, FloatArray]]:
        """Each tensor in place by its name as an input, `[count, kv_heads, capacity, head_dim]`."""
        for name, array in self._arrays.items():
            yield name, array[first : first + count]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of a row over those of another."""
        for array in self._arrays.values():
            array[target, :, :tokens] = array[source, :, :tokens]

    def exchange(self, rows: Exchange) -> None:
        """Two rows change places, and memory goes back behind what each of them holds now.

        Needs no memory of its own, so that it cannot fail halfway.
        """
        longer, shorter = (rows.first, rows.first_tokens), (rows.second, rows.second_tokens)
        if longer[1] < shorter[1]:
            longer, shorter = shorter, longer
        (full, most), (other, common) = longer, shorter
        _, heads, _, width = self._shape
        if common:
            kept = self._scratch[: heads * common * width].reshape(heads, common, width)
            for array in self._arrays.values():
                kept[:] = array[full, :, :common]
                array[full, :, :common] = array[other, :, :common]
                array[other, :, :common] = kept
        if most > common:
            for array in self._arrays.values():
                array[other, :, common:most] = array[full, :, common:most]
            self.drop(full, common, most)
        self.drop(other, most, most)  # what was kept for tokens about to come, which come elsewhere

    def read(self, row: int, tokens: int) -> KeyValues:
        """A copy of the first `tokens` tokens of a row: `[kv_heads, tokens, head_dim]` each."""
        return {name: array[row, :, :tokens].copy() for name, array in self._arrays.items()}

    def write(self, row: int, rows: KeyValues, start: int) -> int:
        """Put back what `read` gave, from token `start` on; returns how many tokens it holds.

        Raises:
            SessionError: it is of another cache; nothing was written.
        """
        _, heads, capacity, width = self._shape
        given = next(iter(rows.values())).shape if rows else ()
        tokens = given[1] if len(given) == 3 else 0
        shape = (heads, tokens, width)
        fit = all(one.shape == shape and one.dtype == np.float32 for one in rows.values())
        if not fit or rows.keys() != self._arrays.keys() or not 0 < tokens <= capacity:
            kinds = sorted({f"{one.dtype} {list(one.shape)}" for one in rows.values()})
            raise SessionError(
                "Saved keys and values are not of this engine's cache.",
                found=f"{len(rows)} tensors: {', '.join(kinds)}"[:200],
                expected=f"{len(self._arrays)} tensors: float32 [{heads}, up to {capacity}, "
                f"{width}]",
                fix="load the session into the engine that it was saved from, with its window",
            )
        for name, array in self._arrays.items():
            array[row, :, start:tokens] = rows[name][:, start:]
        return tokens

    def drop(self, row: int, tokens: int, used: int) -> None:
        """Of a row's first `used` tokens, give the memory behind the first `tokens` back.

        To the system; a little of it is kept for the tokens that come next.
        """
        used = self._touched[row] = max(self._touched[row], used)
        if self._memory_of(used) - self._memory_of(tokens) <= self._kept:
            return
        self._touched[row] = tokens
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        _, heads, capacity, width = self._shape
        page = mmap.PAGESIZE
        if not tokens:  # what there is of all heads lies together
            heads, capacity = 1, heads * capacity
        for head in range(heads):
            begin = (row * heads + head) * capacity * width * 4
            start = -(-(begin + tokens * width * 4) // page) * page
            stop = (begin + capacity * width * 4) // page * page
            if stop > start:
                for memory in self._memory.values():
                    memory.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _memory_of(self, tokens: int) -> int:
        """Bytes of the pages that so many first tokens of a row are in."""
        _, heads, _, width = self._shape
        pages = -(-tokens * width * 4 // mmap.PAGESIZE)
        return len(self._arrays) * heads * pages * mmap.PAGESIZE


class PlacedCache:
    """A dense cache whose slots lie where the steps want them: see `Rows`."""

    def __init__(self, kv: KVLayout, slots: int, capacity: int) -> None:
        self._cache = DenseCache(kv, slots, capacity)
        self._rows = Rows(slots)

    def rows(self, first: int, count: int) -> Iterator[tuple[str, FloatArray]]:
        """See `DenseCache.rows`."""
        return self._cache.rows(first, count)

    def arrange(self, batch: DecoderBatch) -> tuple[int, Order]:
        """Bring a batch's slots side by side: their first row, and the batch's rows from there.

        Its tokens will be written there; some of them are where that fails.
        """
        arrangement = self._rows.arrange(batch.slots)
        for exchange in arrangement.exchanges:
            self._cache.exchange(exchange)
        self._rows.reach(tuple(batch.slots), batch.past_lengths + batch.input_ids.shape[1])
        return arrangement.first_row, arrangement.index

    def move(self, move: Move) -> None:
        """See `DecoderSession`."""
        rows = self._rows
        place = move.target if isinstance(move, Copy) else move.place
        row, used, kept = rows.row(place), rows.tokens(place), max(move.tokens, move.room)
        if isinstance(move, Copy):
            for exchange in rows.renew(place):
                self._cache.exchange(exchange)
                kept = exchange.second_tokens  # another's are there now
            self._cache.copy(rows.row(move.source), rows.row(place), move.tokens)
            rows.set_tokens(place, move.tokens)
        else:
            rows.leave(place, move.tokens)
        self._cache.drop(row, kept, used)

    def read(self, place: Sequence[int], tokens: int) -> KeyValues:
        """See `DecoderSession`."""
        return self._cache.read(self._rows.row(place[0]), tokens)

    def write(self, place: Sequence[int], rows: KeyValues, start: int) -> None:
        """See `DecoderSession`."""
        tokens = self._cache.write(self._rows.row(place[0]), rows, start)
        self._rows.reach((place[0],), np.array([tokens]))


def _lazy_memory(size: int) -> mmap.mmap:
    """Zeros whose pages cost memory only once they are written to.

    Private, because pages of shared memory stay when they are advised away. Huge pages are
    declined: one token of each head would make two megabytes resident.
    """
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise BackendUnavailableError(
            "The system gives no address space for the key/value cache.",
            found=f"{error}, for {size / 1e9:.2f} GB of each of its tensors",
            expected="address space for the windows of all sequences, though not memory",
            fix="EngineConfig(max_batch_size=...) with fewer sequences, or a higher ulimit -v",
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
