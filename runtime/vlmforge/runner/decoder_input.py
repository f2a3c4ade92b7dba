"""Prompts as the decoder takes them, alone or several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from msgspec import Struct

from vlmforge.backends import DecoderBatch, IntArray
from vlmforge.backends.features import Features, joined
from vlmforge.engine.manifest import DecodePolicy
from vlmforge.engine.positions.in_graph import Places


class DecoderInput(Struct, frozen=True):
    """A prompt as the decoder takes it.

    Attributes:
        ids: int64 `[tokens]`; an id >= vocab_size is row `id - vocab_size` of `features`.
        features: `[rows, hidden]` of all images, or None without images.
        rotary_level: Of the sequence that the prompt begins (see `PositionPolicy`).
        places: Where each token is, if the decoder is told; None: it counts them.
        lag: By how much the place of a token behind the prompt is below its number in the sequence.
    """

    ids: IntArray
    features: Features | None
    rotary_level: int = 0
    places: Places | None = None
    lag: int = 0

    def places_from(self, start: int, count: int) -> Places | None:
        """Where `count` tokens from `start` on are, those that were generated included."""
        if self.places is None:
            return None
        known = self.places[start : start + count]
        more = np.arange(start + len(known), start + count, dtype=np.int64) - self.lag
        behind = np.broadcast_to(more[:, None], (len(more), known.shape[1]))
        return np.concatenate((known, behind))

    def handed_over(self, vocab_size: int) -> tuple[IntArray, Features | None]:
        """The ids with the rows of features that they are of, from 0 on, and these rows alone."""
        ids = self.ids
        rows = ids[ids >= vocab_size]
        if not len(rows) or self.features is None:
            return ids, None
        first = int(rows[0]) - vocab_size
        features = self.features[first : int(rows[-1]) - vocab_size + 1]
        return np.where(ids >= vocab_size, ids - first, ids), features


class PromptPart(NamedTuple):
    """The next tokens of a sequence that has its first `past` in the cache at `place`."""

    place: Sequence[int]
    chunk: DecoderInput
    past: int


def alone(
    part: PromptPart, logits: Literal["none", "last", "all"], decode: DecodePolicy
) -> DecoderBatch:
    """A part of one prompt as a batch."""
    (place, chunk, past), policy = part, decode.positions
    ids, features = chunk.handed_over(decode.vocab_size)
    every = np.arange(len(ids), dtype=np.int64)
    wanted = {"none": every[:0], "last": every[-1:], "all": every}[logits]
    levels = np.array([chunk.rotary_level], np.int64) if policy.has_levels else None
    lengths, places = np.array([past], np.int64), chunk.places_from(past, len(ids))
    turns = None if places is None else policy.turns(places[None])
    return DecoderBatch(
        place[:1], ids[None], lengths, features, wanted[None], levels, (place,), turns
    )


def together(parts: Sequence[PromptPart], decode: DecodePolicy) -> DecoderBatch:
    """Parts of several prompts as one batch, filled up to the longest; logits after the last ones.

    What fills a row up are tokens of id 0 that take part in nothing (`DecoderBatch.lengths`).
    """
    lengths = np.array([len(part.chunk.ids) for part in parts], np.int64)
    ids = np.zeros((len(parts), int(lengths.max())), np.int64)
    width, policy = decode.positions.turn_width, decode.positions
    turns = np.zeros((*ids.shape, width), np.float32) if width else None
    features, rows = list[Features](), 0
    for row, part in enumerate(parts):
        own, found = part.chunk.handed_over(decode.vocab_size)
        ids[row, : len(own)] = np.where(own >= decode.vocab_size, own + rows, own)
        if found is not None:
            features.append(found)
            rows += len(found)
        places = part.chunk.places_from(part.past, len(own))
        if turns is not None and places is not None:
            turns[row, : len(own)] = policy.turns(places[None])[0]
    levels = np.array([part.chunk.rotary_level for part in parts], np.int64)
    return DecoderBatch(
        tuple(part.place[0] for part in parts),
        ids,
        np.array([part.past for part in parts], np.int64),
        joined(features) if features else None,
        lengths[:, None] - 1,
        levels if policy.has_levels else None,
        tuple(part.place for part in parts),
        turns,
        lengths,
    )
