"""What the scheduler asks of a key/value cache, whatever it is stored in.

Content is told by keys, one for each token: a text token's key is its id, an image row's key is
derived from the image's content, so equal placeholders of different images never match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Keys = NDArray[np.int64]
NO_KEYS: Keys = np.empty(0, np.int64)


class Copy(Struct, frozen=True):
    """The first `tokens` tokens of place `source` are to be copied over those of `target`.

    `room`: see `Drop`.
    """

    source: int
    target: int
    tokens: int
    room: int = 0


class Drop(Struct, frozen=True):
    """What place `place` holds from token `tokens` on is of no use, and nobody runs there yet.

    Its memory may go back, but for that of the first `room` tokens: these are about to come.
    """

    place: int
    tokens: int
    room: int = 0


Move = Copy | Drop
"""Of slots or of blocks, whatever the cache is made of."""


class KVCache(Protocol):
    """Bookkeeping of keys and values; sequences are named by their ids.

    Attributes:
        reuses: Whether a sequence may find what others have of its tokens.
    """

    reuses: bool

    @property
    def used_blocks(self) -> int:
        """Blocks with tokens in them, of sequences and of what ended ones left."""

    def begin(self, sequence: int, keys: Keys, *, salt: bytes, reuse: bool) -> int | None:
        """Take in a sequence that is to hold `keys`.

        Args:
            sequence: Its id, not in the cache.
            keys: Of all tokens that it has so far, at least one.
            salt: Tokens of sequences with another salt are never reused: their keys and values
                differ, or must not be told from their speed.
            reuse: False runs every token anew, because the logits after each are wanted.

        Returns:
            How many of its first tokens are there already, fewer than `len(keys)`; or None while
            there is no room for it: nothing was changed.
        """

    def fork(self, parent: int, child: int, keys: Keys) -> bool:
        """A second sequence that has the first tokens of another, whose keys are `keys`.

        Prefixes need not be reused for that; False while there is no room: nothing was changed.
        """

    def grow(self, sequence: int, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; False when there is none: nothing was changed."""

    def note(self, sequence: int, keys: Keys) -> None:
        """The next `len(keys)` tokens have been written; room for them was made before."""

    def free(self, sequence: int, *, valid: bool = True) -> None:
        """The sequence ends. Its tokens are kept for others until room is needed.

        `valid=False` forgets them: after an error it is unknown what was written.
        """

    def find(self, keys: Keys, *, salt: bytes) -> tuple[tuple[int, ...], int]:
        """Where the longest beginning of `keys` is (see `place`), and of how many tokens.

        Nothing is changed. What `take_moves` has not given yet may be missing there.
        """

    def place(self, sequence: int) -> tuple[int, ...]:
        """Where a sequence is: its slot, or its blocks in order."""

    def take_moves(self) -> tuple[Move, ...]:
        """What is to be done, in order and before the next step, since this was last asked."""

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens could ever be held, with nothing beside it."""


def common_prefix(first: Keys, second: Keys) -> int:
    """Number of equal elements at the beginning."""
    length = min(len(first), len(second))
    if not length:
        return 0
    differs = first[:length] != second[:length]
    place = int(differs.argmax())
    return place if differs[place] else length


def joined(keys: Keys, more: Keys | Sequence[int], room: Keys) -> tuple[Keys, Keys]:
    """`keys` with `more` behind them, and the memory where both lie.

    That is `room` again if `keys` is a beginning of it and `more` fits, so that a token costs no
    copy of those before it. Who shares `room` sees what is behind `keys` change.
    """
    start, end = len(keys), len(keys) + len(more)
    if keys.base is not room or end > len(room):
        room = np.empty(2 * end, np.int64)
        room[:start] = keys
    if end - start == 1:  # mostly
        room[start] = more[0]
    else:
        room[start:end] = more
    return room[:end], room
