"""Continuous batching on a decoder whose next token depends on all that is in the cache."""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from vlmforge.backends import FloatArray, IntArray, LoadOptions
from vlmforge.errors import CancelledError
from vlmforge.inputs.render import RenderedPrompt
from vlmforge.kv.cache import Copy, Move
from vlmforge.outputs.token_chooser import PrefillFacts
from vlmforge.runner.clock import PartClock
from vlmforge.runner.job import Job
from vlmforge.runner.stages import DecoderInput
from vlmforge.scheduler.loop import Loop

VOCAB = 97
CAPACITY = 80
BLOCK = 4


def next_token(content: IntArray) -> int:
    return zlib.crc32(content.astype(np.int64).tobytes()) % VOCAB


def level(prompt: int) -> int:
    """The rotary level of a sequence with a prompt of that many tokens."""
    return prompt // 13


def stored(ids: IntArray, levels: IntArray | int) -> IntArray:
    """What is in the cache: another level makes other keys and values of the same tokens."""
    return ids + 1000 * levels


def alone(prompt: list[int], count: int) -> list[int]:
    """What a sequence generates when nothing else runs."""
    content = list(prompt)
    for _ in range(count):
        content.append(next_token(stored(np.array(content), level(len(prompt)))))
    return content[len(prompt) :]


class Cache:
    """Slots of token ids in the place of keys and values; what is not valid is poison."""

    def __init__(self, slots: int) -> None:
        self.tokens = np.full((slots, CAPACITY), -7, np.int64)

    def move(self, move: Move) -> None:
        if isinstance(move, Copy):
            self.tokens[move.target, : move.tokens] = self.tokens[move.source, : move.tokens]
        else:
            self.tokens[move.place, move.tokens :] = -7


class FakeEngine:
    """The functions of an engine that a loop uses."""

    choosing = None
    overlapping = None

    def __init__(self, slots: int, blocks: int | None) -> None:
        self.decoder, self.clock = Cache(slots), PartClock()
        self.options = LoadOptions(slots, CAPACITY, budget=blocks, block_size=BLOCK)
        self.gone = False

    def let_go(self) -> None:
        self.gone = True

    def rotary_level(self, tokens: int) -> int:
        return level(tokens)

    def keys(self, prompt: RenderedPrompt, _: object) -> IntArray:
        return np.array(prompt.token_ids, np.int64)

    def decoder_input(self, prompt: RenderedPrompt, _: object) -> DecoderInput:
        ids = np.array(prompt.token_ids, np.int64)
        return DecoderInput(ids, None, level(len(ids)))

    def prefill(
        self, place: tuple[int, ...], chunk: DecoderInput, past: int, *, logits: str
    ) -> FloatArray:
        assert logits != "all"
        (slot,) = place
        stop = past + len(chunk.ids)
        self.decoder.tokens[slot, past:stop] = stored(chunk.ids, chunk.rotary_level)
        return self._logits([(slot, stop)] if logits == "last" else [])

    def decode(
        self,
        at: list[tuple[int, ...]],
        tokens: IntArray,
        lengths: IntArray,
        levels: IntArray,
        lags: IntArray,
        *,
        likeliest: bool,
        choices: None,
    ) -> FloatArray:
        assert not likeliest and not lags.any()  # nobody here said that it would do
        assert choices is None
        slots = [slot for (slot,) in at]
        self.decoder.tokens[slots, lengths] = stored(tokens, levels)
        places = zip(slots, lengths, strict=True)
        return self._logits([(slot, int(length) + 1) for slot, length in places])

    def _logits(self, places: list[tuple[int, int]]) -> FloatArray:
        logits = np.zeros((len(places), VOCAB), np.float32)
        for row, (slot, length) in enumerate(places):
            logits[row, next_token(self.decoder.tokens[slot, :length])] = 1
        return logits


@dataclass
class Collect:
    """Takes `count` tokens and ends."""

    count: int
    tokens: list[int] = field(default_factory=list)
    error: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    wants_prompt_logits: bool = False

    def begin(self, facts: PrefillFacts) -> None:
        assert facts.prompt_logits is None

    def accept(self, logits: FloatArray) -> int | None:
        self.tokens.append(int(logits.argmax()))
        if len(self.tokens) < self.count:
            return self.tokens[-1]
        self.ended.set()
        return None

    def fail(self, error: Exception) -> None:
        self.error = error
        self.ended.set()


def loop(slots: int, chunk: int, *, reuse: bool, blocks: int | None = None) -> Loop:
    features = SimpleNamespace(get=lambda images, ahead: ([], 0), let_go=lambda: None)
    engine = FakeEngine(slots, blocks)
    return Loop(engine, features, chunk=chunk, reuse_prefixes=reuse)  # type: ignore[arg-type]


def job(prompt: list[int], generation: Collect) -> Job:
    return Job(RenderedPrompt("", tuple(prompt), ()), (), generation)


# Few different tokens, so that prompts share beginnings.
REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 30)),
    min_size=1,
    max_size=12,
)


# None: room for all; else as few blocks as hold the longest request, and a few more.
BLOCKS = st.none() | st.integers(-(-70 // BLOCK), 3 * -(-70 // BLOCK))


@given(REQUESTS, st.integers(1, 5), st.integers(1, 50), st.booleans(), BLOCKS)
@settings(max_examples=examples(80))
def test_sequences_do_not_disturb_each_other(
    requests: list[tuple[list[int], int]], slots: int, chunk: int, reuse: bool, blocks: int | None
) -> None:
    running = loop(slots, chunk, reuse=reuse, blocks=blocks)
    try:
        collected = [Collect(count) for _, count in requests]
        for (prompt, _), generation in zip(requests, collected, strict=True):
            running.submit(job(prompt, generation))
        for (prompt, count), generation in zip(requests, collected, strict=True):
            assert generation.ended.wait(600)
            assert generation.error is None
            assert generation.tokens == alone(prompt, count)
    finally:
        running.close()


@given(REQUESTS, st.integers(2, 4), st.integers(1, 9), st.data())
@settings(max_examples=examples(40))
def test_a_cancelled_sequence_leaves_the_others_alone(
    requests: list[tuple[list[int], int]], slots: int, chunk: int, data: st.DataObject
) -> None:
    running = loop(slots, chunk, reuse=True)
    try:
        collected = [Collect(count) for _, count in requests]
        jobs = [job(p, c) for (p, _), c in zip(requests, collected, strict=True)]
        for submitted in jobs:
            running.submit(submitted)
        for cancelled in data.draw(st.sets(st.sampled_from(range(len(jobs))))):
            running.cancel(jobs[cancelled])
        for (prompt, count), generation in zip(requests, collected, strict=True):
            assert generation.ended.wait(600)
            if generation.error is None:
                assert generation.tokens == alone(prompt, count)
            else:
                assert isinstance(generation.error, CancelledError)
    finally:
        running.close()


def test_a_closed_loop_refuses() -> None:
    running = loop(1, 8, reuse=True)
    running.close()
    assert running._engine.gone  # type: ignore[attr-defined]
    with pytest.raises(CancelledError, match="closed"):
        running.submit(job([1], Collect(1)))
