"""A pool of blocks of equal size: shared by content, copied on write, the least recently used go.

After PagedAttention (https://arxiv.org/abs/2309.06180). A full block is found by the hash of
all tokens up to its end, so sequences that begin alike have their first blocks in common. A block
that no sequence has any more keeps its content until it is needed for something else.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
from msgspec import Struct, field
from typing_extensions import override

from vlmforge.kv.cache import NO_KEYS, Copy, Keys, KVCache, Move


class _Sequence(Struct):
    salt: bytes
    blocks: list[int]
    digests: list[bytes]  # of its full blocks
    length: int  # tokens written
    tail: Keys = field(default_factory=lambda: NO_KEYS)  # keys since the last full block


class BlockPool(KVCache):
    """A `KVCache` of `blocks` blocks of `block_size` tokens.

    With `reuse=False` nothing is kept.
    """

    def __init__(self, blocks: int, block_size: int, *, reuse: bool = True) -> None:
        self.blocks, self.block_size, self.reuses = blocks, block_size, reuse
        self._uses = [0] * blocks
        self._empty = list(range(blocks - 1, -1, -1))  # of no use to anybody; popped from the end
        self._kept: OrderedDict[int, bytes] = OrderedDict()  # unused, with content; oldest first
        self._found: dict[bytes, int] = {}  # block by the digest of its content
        self._digest_of: dict[int, bytes] = {}
        self._sequences: dict[int, _Sequence] = {}
        self._copies: list[Move] = []

    @property
    @override
    def used_blocks(self) -> int:
        return self.blocks - len(self._empty)

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence has, with or without content."""
        return len(self._empty) + len(self._kept)

    @override
    def find(self, keys: Keys, *, salt: bytes) -> tuple[tuple[int, ...], int]:
        _, blocks = self._match(keys, salt)
        return tuple(blocks), len(blocks) * self.block_size

    @override
    def place(self, sequence: int) -> tuple[int, ...]:
        return tuple(self._sequences[sequence].blocks)

    def uses(self, block: int) -> int:
        """How many sequences have the block."""
        return self._uses[block]

    @override
    def take_moves(self) -> tuple[Move, ...]:
        copies, self._copies = tuple(self._copies), []
        return copies

    @override
    def fits(self, tokens: int) -> bool:
        return self._count(tokens) <= self.blocks

    @override
    def begin(self, sequence: int, keys: Keys, *, salt: bytes, reuse: bool) -> int | None:
        # The last token is left to run, because its logits are needed.
        digests, known = self._match(keys[:-1] if reuse and self.reuses else keys[:0], salt)
        revived = sum(self._uses[block] == 0 for block in known)
        if self._count(len(keys)) - len(known) + revived > self.free_blocks:
            return None
        for block in known:
            self._use(block)
        cached = len(known) * self.block_size
        self._sequences[sequence] = _Sequence(salt, known, digests, cached)
        return cached

    @override
    def grow(self, sequence: int, tokens: int) -> bool:
        held = self._sequences[sequence]
        missing = self._count(tokens) - len(held.blocks)
        splits = self._writes_to_shared(held)
        if max(missing, 0) + splits > self.free_blocks:
            return False
        if splits:
            self._split(held)
        held.blocks += [self._take() for _ in range(missing)]
        return True

    @override
    def note(self, sequence: int, keys: Keys) -> None:
        held = self._sequences[sequence]
        held.length += len(keys)
        tail = np.concatenate((held.tail, keys))
        while len(tail) >= self.block_size:
            block = held.blocks[len(held.digests)]
            digest = self._digest(held.digests, tail[: self.block_size], held.salt)
            held.digests.append(digest)
            if digest not in self._found:  # another sequence may have computed the same meanwhile
                self._found[digest], self._digest_of[block] = block, digest
            tail = tail[self.block_size :]
        held.tail = tail

    @override
    def fork(self, parent: int, child: int, keys: Keys) -> bool:
        if not self.free_blocks:  # its next token needs a block of its own
            return False
        given, full = self._sequences[parent], len(keys) // self.block_size
        blocks = given.blocks[: self._count(len(keys))]
        for block in blocks:
            self._use(block)
        tail = keys[full * self.block_size :]
        self._sequences[child] = _Sequence(
            given.salt, blocks, given.digests[:full], len(keys), tail
        )
        return True

    @override
    def free(self, sequence: int, *, valid: bool = True) -> None:
        held = self._sequences.pop(sequence)
        # From the end: what others can use longest, the beginning, is given up last.
        for block in reversed(held.blocks):
            self._let_go(block, valid=valid)

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _match(self, keys: Keys, salt: bytes) -> tuple[list[bytes], list[int]]:
        """Digests and blocks of the longest beginning of `keys` that is there, in whole blocks."""
        digests: list[bytes] = []
        blocks: list[int] = []
        for start in range(0, len(keys) - self.block_size + 1, self.block_size):
            digest = self._digest(digests, keys[start : start + self.block_size], salt)
            if digest not in self._found:
                break
            digests.append(digest)
            blocks.append(self._found[digest])
        return digests, blocks

    def _digest(self, before: list[bytes], keys: Keys, salt: bytes) -> bytes:
        """Of the last block's own keys and of the digest of all before it."""
        content = hashlib.blake2b(digest_size=16, key=hashlib.sha256(salt).digest())
        content.update(before[-1] if before else b"")
        content.update(np.ascontiguousarray(keys).tobytes())
        return content.digest()

    def _use(self, block: int) -> None:
        self._kept.pop(block, None)
        self._uses[block] += 1

    def _let_go(self, block: int, *, valid: bool = True) -> None:
        self._uses[block] -= 1
        if self._uses[block]:
            return
        if not valid:
            self._forget(block)
        if digest := self._digest_of.get(block):
            self._kept[block] = digest
        else:
            self._empty.append(block)

    def _take(self) -> int:
        """A block for new content; there must be one."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        self._uses[block] = 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._found[digest]

    def _writes_to_shared(self, sequence: _Sequence) -> bool:
        """Whether the next token goes into a block that others have too, or may find."""
        index, offset = divmod(sequence.length, self.block_size)
        if not offset:
            return False
        block = sequence.blocks[index]
        return self._uses[block] > 1 or block in self._digest_of

    def _split(self, sequence: _Sequence) -> None:
        index, offset = divmod(sequence.length, self.block_size)
        shared = sequence.blocks[index]
        own = self._take()
        sequence.blocks[index] = own
        self._copies.append(Copy(shared, own, offset))
        self._let_go(shared)
