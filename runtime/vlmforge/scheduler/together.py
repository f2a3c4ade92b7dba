"""How much of which prompts runs in one step. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from vlmforge.runner.step import Row

_PART = 256  # tokens of a prompt that are worth a beginning, where they fill a step up
_WASTE = 0.15  # of a step at most, where prompts are filled up to the longest
_ALIKE, _ALIKE_APART = 64, 16
_FREE = 256  # tokens of a step that take hardly longer than one: weights are read for all


class Together(Struct, frozen=True):
    """Of the prompts of a step.

    Attributes:
        chunk: Tokens of all of them, at most.
        prompts: So many, at most.
        packs: They take no more than their own tokens, so that the last may be run in part. If
            not, each is filled up to the longest, and those that would leave much unused wait.
        window: Tokens of a sequence, those that fill it up included.
        apart: They are run one after the other, so that a step less spares little.
    """

    chunk: int
    prompts: int = 1
    packs: bool = False
    window: int = 1 << 62
    apart: bool = False

    @property
    def alike(self) -> int:
        """Who begins with as many tokens as another of the step waits: the cache has them then."""
        return _ALIKE_APART if self.apart else _ALIKE

    def tokens(self, decoding: int) -> int:
        """Of prompts at most, where so many others decode in the same step.

        Packed, they are no more than a chunk with these: matrices are multiplied fastest that have
        as many rows as there are places for, and few sizes of steps come again. Apart, these are
        in matrices of their own.
        """
        with_these = self.packs and not self.apart
        return max(1, self.chunk // 2, self.chunk - decoding) if with_these else self.chunk

    def room(self, rows: Sequence[Row], decoding: int) -> int:
        """Tokens that one more may have beside these."""
        if len(rows) >= self.prompts:
            return 0
        lengths = [len(row.tokens) for row in rows]
        if self.packs:
            return max(0, self.tokens(decoding) - sum(lengths))
        room = self.chunk // (len(rows) + 1)
        return room if max(lengths) <= room else 0

    def part(self, left: int, room: int) -> int:
        """How many of the tokens that are left of a prompt are run where so many have room."""
        begins = self.packs and room >= min(_PART, self.chunk)
        return left if left <= room else room if begins else 0

    def fits(self, rows: Sequence[Row], start: int, stop: int) -> bool:
        """Whether these tokens beside `rows` fit their windows, and leave little unused."""
        if self.packs:
            return True
        lengths = [stop - start, *(len(row.tokens) for row in rows)]
        whole = len(lengths) * max(lengths)
        ends = max(start, *(row.start for row in rows)) + max(lengths)
        little = whole <= _FREE or whole - sum(lengths) <= _WASTE * whole
        return ends <= self.window and little
