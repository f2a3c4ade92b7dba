"""What the first rank has the others do: the calls of a `DecoderSession`, as plain data."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from msgspec import Struct
from typing_extensions import override

from vlmforge.backends import (
    ClosableDecoder,
    Communicator,
    DecoderBatch,
    DecoderSession,
    FloatArray,
    FollowingDecoder,
    IntArray,
    KeyValues,
    LoadOptions,
)
from vlmforge.errors import RankError
from vlmforge.kv.cache import Drop, Move

SILENT_S = 3.5
"""A rank that has given no sign that it lives for so long hangs."""


class Read(Struct, frozen=True):
    """See `DecoderSession.read`; what it gives is sent back."""

    place: tuple[int, ...]
    tokens: int


class Write(Struct, frozen=True):
    """See `DecoderSession.write`; `rows` are of all ranks' heads."""

    place: tuple[int, ...]
    rows: KeyValues
    start: int


class NextTokens(Struct, frozen=True):
    """See `FollowingDecoder.follow_tokens`."""

    batch: DecoderBatch
    ahead: IntArray
    chosen: bool


class FirstTokens(Struct, frozen=True):
    """See `FollowingDecoder.follow_first`."""

    batch: DecoderBatch
    chosen: bool


Call = DecoderBatch | NextTokens | FirstTokens | Move | Read | Write


class OtherRanks(Protocol):
    """Those that the first rank leads."""

    @property
    def communicator(self) -> Communicator:
        """Where the first rank meets them."""

    @property
    def over(self) -> bool:
        """Whether they have ended, for whatever reason."""

    def begin(self, folder: Path, options: LoadOptions) -> LoadOptions:
        """Have them load their parts of an engine; returns the options of the first rank's."""

    def wait_until_loaded(self) -> None:
        """Returns when all have (RankError: one cannot)."""

    def tell(self, call: Call) -> None:
        """Have all of them do it; does not wait until they have (RankError: one cannot)."""

    def answers(self) -> list[KeyValues]:
        """What each of them has to say to a `Read`, in order (RankError: one does not)."""

    def give_up(self, error: BaseException) -> None:
        """End them because the first rank failed: nobody knows at which meeting they wait."""

    def close(self) -> None:
        """End them. May be called more than once, and by any thread."""


def carry_out(call: Call, decoder: DecoderSession, rank: int, size: int) -> KeyValues | None:
    """Do what the first rank has told; returns what is to be sent back, or None."""
    if isinstance(call, DecoderBatch):
        if isinstance(decoder, FollowingDecoder):
            decoder.follow(call)
        else:
            decoder.step(call)
    elif isinstance(call, NextTokens):
        assert isinstance(decoder, FollowingDecoder)
        decoder.follow_tokens(call.batch, call.ahead, chosen=call.chosen)
    elif isinstance(call, FirstTokens):
        assert isinstance(decoder, FollowingDecoder)
        decoder.follow_first(call.batch, chosen=call.chosen)
    elif isinstance(call, Read):
        return decoder.read(call.place, call.tokens)
    elif isinstance(call, Write):
        decoder.write(call.place, _share(call.rows, rank, size), call.start)
    else:
        decoder.move(call)
    return None


def _share(rows: KeyValues, rank: int, size: int) -> KeyValues:
    """A rank's heads of all."""

    def part(heads: int) -> slice:
        return slice(rank * heads // size, (rank + 1) * heads // size)

    return {name: values[part(len(values))] for name, values in rows.items()}


def rank_error(rank: int, size: int, reason: str) -> RankError:
    """What ends everything that `size` ranks were doing."""
    return RankError(
        f"Rank {rank} of {size} failed, and with it what all of them were doing.",
        found=f"rank {rank}: {reason}",
        expected="ranks that run for as long as their pipeline does",
        fix="close the pipeline and make it again: pipeline(ENGINE, ...); if memory was short, "
        "with a smaller max_batch_size or session_len",
    )


def no_sign(seconds: float) -> str:
    """The reason of one that hangs."""
    return f"it hangs: no sign of it for {seconds:g} seconds"


class RankedDecoder(DecoderSession, ClosableDecoder):
    """A decoder of several ranks, seen from the first: it has the others do what it does itself.

    Keys and values that are read are those of all ranks' heads, one rank after the other.
    """

    def __init__(self, own: DecoderSession, others: OtherRanks) -> None:
        self.own, self._others = own, others
        self._size = others.communicator.size
        # Who drops the decoder ends the ranks; where the process ends, they see it themselves.
        weakref.finalize(self, others.close).atexit = False

    @override
    def step(self, batch: DecoderBatch) -> FloatArray:
        with self.together(batch):
            return self.own.step(batch)

    @override
    def move(self, move: Move) -> None:
        if isinstance(move, Drop) and self._others.over:
            return  # the memory went with them
        with self.together(move):
            self.own.move(move)

    @override
    def read(self, place: Sequence[int], tokens: int) -> KeyValues:
        own = self.own.read(place, tokens)  # refused before anything is told
        with self.all_or_none():
            self._others.tell(Read(tuple(place), tokens))
            shares = [own, *self._others.answers()]
        return {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}

    @override
    def write(self, place: Sequence[int], rows: KeyValues, start: int) -> None:
        self.own.write(place, _share(rows, 0, self._size), start)  # refused before anything is told
        with self.all_or_none():
            self._others.tell(Write(tuple(place), rows, start))

    @override
    def close(self) -> None:
        self._others.close()

    @contextmanager
    def together(self, call: Call) -> Iterator[None]:
        """The others do `call` while this rank does its share of it."""
        with self.all_or_none():
            self._others.tell(call)
            yield

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """All ranks do it, or none is of use any more."""
        try:
            yield
        except BaseException as error:
            self._others.give_up(error)
            # What is held there is of the memory that ranks share: it goes now, whoever keeps the
            # error.
            traceback.clear_frames(error.__traceback__)
            raise
