"""Dense slots: one sequence each, with room for a whole window; what an ended one leaves is kept.

Memory is touched only where tokens are, so what counts is not the slots but the blocks of tokens
in them: those are bounded by a budget, and the least recently used leftovers go first.
"""

from __future__ import annotations

from msgspec import Struct, field
from typing_extensions import override

from vlmforge.kv.cache import NO_KEYS, Copy, Drop, Keys, KVCache, Move, common_prefix, joined


class _Slot(Struct):
    owner: int | None = None
    keys: Keys = field(default_factory=lambda: NO_KEYS)
    salt: bytes = b""
    room: int = 0  # blocks that are accounted for
    last_used: int = 0
    memory: Keys = field(default_factory=lambda: NO_KEYS)


class SlotCache(KVCache):
    """A `KVCache` of `slots` slots of `capacity` tokens, that may touch `budget` blocks in all.

    With `reuse=False` nothing is kept.
    """

    def __init__(
        self, slots: int, capacity: int, *, budget: int, block_size: int = 64, reuse: bool = True
    ) -> None:
        self._slots = [_Slot() for _ in range(slots)]
        self._capacity, self._budget, self._block_size = capacity, budget, block_size
        self.reuses = reuse
        self._place: dict[int, int] = {}
        self._moves: list[Move] = []
        self._clock = 0

    @property
    @override
    def used_blocks(self) -> int:
        return sum([slot.room for slot in self._slots])

    @property
    def held_blocks(self) -> int:
        """Blocks of the sequences that are there."""
        return sum([slot.room for slot in self._slots if slot.owner is not None])

    @override
    def find(self, keys: Keys, *, salt: bytes) -> tuple[tuple[int, ...], int]:
        slot, tokens = self._longest_prefix(keys, salt)
        return ((), 0) if slot is None else ((slot,), tokens)

    @override
    def place(self, sequence: int) -> tuple[int, ...]:
        return (self._place[sequence],)

    @override
    def take_moves(self) -> tuple[Move, ...]:
        moves, self._moves = tuple(self._moves), []
        return moves

    @override
    def fits(self, tokens: int) -> bool:
        return tokens <= self._capacity and self._count(tokens) <= self._budget

    @override
    def begin(self, sequence: int, keys: Keys, *, salt: bytes, reuse: bool) -> int | None:
        if len(self._place) == len(self._slots):
            return None
        # The last token is left to run, because its logits are needed.
        reuse = reuse and self.reuses
        source, cached = self._longest_prefix(keys[:-1] if reuse else keys[:0], salt)
        takes_over = source is not None and self._goes_on(source, cached)
        target = source if takes_over and source is not None else self._oldest(source)
        if self._count(len(keys)) > self._budget - self.held_blocks:
            return None
        if source is None or cached == 0:
            cached = 0
        elif source != target:
            self._moves.append(Copy(source, target, cached, len(keys)))
        self._occupy(target, sequence, keys[:cached], salt, room=len(keys))
        return cached

    @override
    def fork(self, parent: int, child: int, keys: Keys) -> bool:
        full = len(self._place) == len(self._slots)
        if full or self._count(len(keys) + 1) > self._budget - self.held_blocks:
            return False
        source = self._place[parent]
        target = self._oldest(None)
        self._moves.append(Copy(source, target, len(keys)))
        self._occupy(target, child, keys, self._slots[source].salt, room=len(keys))
        return True

    @override
    def grow(self, sequence: int, tokens: int) -> bool:
        slot = self._slots[self._place[sequence]]
        if tokens <= slot.room * self._block_size:  # mostly
            return tokens <= self._capacity
        wanted = self._count(tokens)
        if tokens > self._capacity or wanted - slot.room > self._budget - self.held_blocks:
            return False
        slot.room = wanted
        self._evict()
        return True

    @override
    def note(self, sequence: int, keys: Keys) -> None:
        slot = self._slots[self._place[sequence]]
        slot.keys, slot.memory = joined(slot.keys, keys, slot.memory)

    @override
    def free(self, sequence: int, *, valid: bool = True) -> None:
        index = self._place.pop(sequence)
        slot = self._slots[index]
        slot.owner = None
        self._clock += 1
        slot.last_used = self._clock
        self._trim(index, len(slot.keys) if valid and self.reuses else 0, left=True)

    def _occupy(self, index: int, sequence: int, keys: Keys, salt: bytes, *, room: int) -> None:
        slot = self._slots[index]
        slot.owner, slot.keys, slot.salt = sequence, keys, salt
        slot.room = max(slot.room, self._count(len(keys)))
        self._place[sequence] = index
        self._trim(index, len(keys), room=room)
        self._evict()

    def _count(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _trim(self, index: int, tokens: int, *, left: bool = False, room: int = 0) -> None:
        """Keep the first `tokens` tokens of a slot, which was `left`, and the blocks of these."""
        slot = self._slots[index]
        slot.keys = slot.keys[:tokens]
        if left or slot.room > self._count(tokens):
            slot.room = self._count(tokens)
            self._moves.append(Drop(index, tokens, room))

    def _evict(self) -> None:
        """Forget leftovers, the oldest first, until the budget holds."""
        over = self.used_blocks - self._budget
        while over > 0:
            index = min(
                (i for i, slot in enumerate(self._slots) if slot.owner is None and slot.room),
                key=lambda i: self._slots[i].last_used,
            )
            over -= self._slots[index].room
            self._trim(index, 0)

    def _longest_prefix(self, keys: Keys, salt: bytes) -> tuple[int | None, int]:
        """The slot that shares the most first tokens with `keys`, a free one between equals."""
        best, best_length = None, 0
        for index, slot in enumerate(self._slots):
            length = common_prefix(slot.keys, keys) if slot.salt == salt else 0
            free_instead = (
                length == best_length > 0
                and slot.owner is None
                and (best is not None and self._slots[best].owner is not None)
            )
            if length > best_length or free_instead:
                best, best_length = index, length
        return best, best_length

    def _goes_on(self, source: int, cached: int) -> bool:
        """Whether a prompt continues what a free slot keeps, and may thus take it over.

        One that shares only the beginning, such as a system prompt, must not wipe out the rest.
        """
        slot = self._slots[source]
        return slot.owner is None and 2 * cached >= len(slot.keys)

    def _oldest(self, spared: int | None) -> int:
        """The free slot that was used least recently; `spared` only if there is no other."""
        free = [i for i, slot in enumerate(self._slots) if slot.owner is None]
        others = [i for i in free if i != spared] or free
        return min(others, key=lambda i: self._slots[i].last_used)
