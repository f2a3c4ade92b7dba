"""Continuous batching: prompts are prefilled in chunks between decoding steps of the others.

One worker thread owns the decoder. Callers submit jobs and get their events through a callback.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vlmforge.backends import FloatArray
from vlmforge.engine import DecoderInput, Engine
from vlmforge.errors import CancelledError, VlmforgeError
from vlmforge.features import FeatureCache, PreparedImage
from vlmforge.prompt.render import RenderedPrompt
from vlmforge.slots import SlotTable


class Generation(Protocol):
    """Chooses the tokens of one sequence and hands them to its caller."""

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the logits after every token of the prompt are needed."""

    def begin(self, facts: PrefillFacts) -> None:
        """The prompt has been run."""

    def accept(self, logits: FloatArray) -> int | None:
        """Choose from logits `[vocab_size]`; the token to run next, or None at the end."""

    def fail(self, error: Exception) -> None:
        """The sequence ends with an error."""


@dataclass(frozen=True, slots=True)
class PrefillFacts:
    """What is known once a prompt has been run; times in seconds.

    `prompt_logits` is `[tokens, vocab_size]` when they were wanted.
    """

    queue: float
    encode: float
    prefill: float
    cached_tokens: int
    cached_images: int
    prompt_logits: FloatArray | None


@dataclass(slots=True, eq=False)
class Job:
    """A request: its prompt, its images and who chooses its tokens."""

    prompt: RenderedPrompt
    images: Sequence[PreparedImage]
    generation: Generation
    submitted: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class _Sequence:
    job: Job
    given: DecoderInput
    slot: int
    done: int  # tokens in the cache
    cached: int
    encode: float
    cached_images: int
    admitted: float
    next_token: int = -1
    prompt_logits: list[FloatArray] = field(default_factory=list)

    @property
    def prefilling(self) -> bool:
        return self.done < len(self.given.ids)


class Scheduler:
    """Runs jobs on an engine, at most `engine.options.slots` of them at once."""

    def __init__(
        self, engine: Engine, features: FeatureCache, *, chunk: int, reuse_prefixes: bool
    ) -> None:
        decoder = engine.decoder
        self._engine, self._features, self._chunk = engine, features, chunk
        self._table = SlotTable(
            engine.options.slots, decoder.copy_slot, decoder.swap_slots, reuse=reuse_prefixes
        )
        self._running: list[_Sequence] = []  # in the order of their slots
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="vlmforge", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job (CancelledError once the scheduler is closed)."""
        with self._wake:
            if self._closed:
                raise _closed()
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """End a job at its next step; its generation fails with `CancelledError`."""
        job.cancelled.set()
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """Cancel what is in flight and end the worker. May be called more than once."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        while self._wait_for_work():
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - reported to every caller in flight
                self._abort(error)
        self._abort(_closed())

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._closed or self._running or self._waiting):
                self._wake.wait()
            return not self._closed

    def _step(self) -> None:
        self._drop_cancelled()
        prefilling = self._running[-1] if self._running and self._running[-1].prefilling else None
        if prefilling is None and self._waiting and self._table.free:
            prefilling = self._admit()
        if prefilling is not None:
            self._prefill(prefilling)
        self._decode([s for s in self._running if not s.prefilling])

    def _drop_cancelled(self) -> None:
        with self._wake:
            dropped = [job for job in self._waiting if job.cancelled.is_set()]
            for job in dropped:
                self._waiting.remove(job)
        for job in dropped:
            job.generation.fail(_cancelled())
        for sequence in [s for s in self._running if s.job.cancelled.is_set()]:
            self._finish(sequence)
            sequence.job.generation.fail(_cancelled())

    def _admit(self) -> _Sequence | None:
        with self._wake:
            job = self._waiting.popleft()
            ahead = [image for waiting in self._waiting for image in waiting.images]
        admitted = time.perf_counter()
        try:
            features, known = self._features.get(job.images, ahead)
            given = self._engine.decoder_input(job.prompt, job.images, features)
        except VlmforgeError as error:
            job.generation.fail(error)
            return None
        encoded = time.perf_counter()
        place = self._table.admit(
            given.keys, fresh=job.generation.wants_prompt_logits, salt=given.rotary_level
        )
        sequence = _Sequence(
            job, given, place.slot, place.cached, place.cached, encoded - admitted, known, admitted
        )
        self._running.append(sequence)
        return sequence

    def _prefill(self, sequence: _Sequence) -> None:
        given, start = sequence.given, sequence.done
        stop = min(start + self._chunk, len(given.ids))
        every = sequence.job.generation.wants_prompt_logits
        logits = self._engine.prefill(sequence.slot, given, start, stop, every=every)
        self._table.extend(sequence.slot, given.keys[start:stop])
        sequence.done = stop
        if every:
            sequence.prompt_logits.append(logits)
        if not sequence.prefilling:
            self._begin(sequence, logits[-1])

    def _begin(self, sequence: _Sequence, logits: FloatArray) -> None:
        now = time.perf_counter()
        prompt_logits = sequence.prompt_logits
        facts = PrefillFacts(
            queue=sequence.admitted - sequence.job.submitted,
            encode=sequence.encode,
            prefill=now - sequence.admitted - sequence.encode,
            cached_tokens=sequence.cached,
            cached_images=sequence.cached_images,
            prompt_logits=np.concatenate(prompt_logits) if prompt_logits else None,
        )
        sequence.prompt_logits = []
        sequence.job.generation.begin(facts)
        self._accept(sequence, logits)

    def _decode(self, sequences: list[_Sequence]) -> None:
        if not sequences:
            return
        tokens = np.array([s.next_token for s in sequences], np.int64)
        lengths = np.array([s.done for s in sequences], np.int64)
        levels = np.array([s.given.rotary_level for s in sequences], np.int64)
        logits = self._engine.decode(tokens, lengths, levels)
        # All tokens are noted before the first sequence ends: the last one then moves into its
        # slot, and what the table does not know of would stay behind.
        for sequence, token in zip(sequences, tokens, strict=True):
            self._table.extend(sequence.slot, token[None])
            sequence.done += 1
        for sequence, row in zip(sequences, logits, strict=True):
            self._accept(sequence, row)

    def _accept(self, sequence: _Sequence, logits: FloatArray) -> None:
        try:
            token = sequence.job.generation.accept(logits)
        except Exception as error:  # noqa: BLE001 - a caller's logits processor may raise anything
            self._finish(sequence)
            sequence.job.generation.fail(error)
            return
        if token is None:
            self._finish(sequence)
        else:
            sequence.next_token = token

    def _finish(self, sequence: _Sequence) -> None:
        """Give up the slot at once: the last sequence moves into it, nobody waits for anybody.

        Decoding runs over the first slots, so a sequence in prefill must stay the last one.
        """
        last = self._running[-1]
        if last.prefilling and sequence is not last:
            self._trade(sequence, self._running[-2])
        index = sequence.slot
        self._running.remove(sequence)
        moved = self._table.release(index)
        if moved is not None:
            last = self._running.pop()
            last.slot = index
            self._running.insert(index, last)

    def _trade(self, first: _Sequence, second: _Sequence) -> None:
        """Two sequences change places."""
        self._table.exchange(first.slot, second.slot)
        first.slot, second.slot = second.slot, first.slot
        self._running.sort(key=lambda sequence: sequence.slot)

    def _abort(self, error: Exception) -> None:
        with self._wake:
            jobs = [s.job for s in self._running] + list(self._waiting)
            self._running.clear()
            self._waiting.clear()
        self._table.reset()
        for job in jobs:
            job.generation.fail(error)


def _cancelled() -> CancelledError:
    return CancelledError("The request was cancelled.", fix="send it again")


def _closed() -> CancelledError:
    return CancelledError(
        "The pipeline is closed.",
        found="a request to a closed pipeline",
        expected="requests before close(), inside the with block",
        fix="make a new one: pipeline(ENGINE)",
    )
