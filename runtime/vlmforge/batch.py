"""Continuous batching: prompts are prefilled in chunks between decoding steps of the others.

No threads here: `Scheduler` calls `step` from its one worker. Whatever is raised by a call that is
made here, by the engine, a cache or a caller's own function, ends the requests that the call was
made for, and no others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from vlmforge.backends import FloatArray
from vlmforge.engine import DecoderInput, Engine
from vlmforge.errors import EngineStepError, as_exception, as_ours
from vlmforge.features import FeatureCache, PreparedImage
from vlmforge.prompt.render import RenderedPrompt
from vlmforge.request import cancelled
from vlmforge.slots import SlotTable

logger = logging.getLogger("vlmforge")
T = TypeVar("T")


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

    `prompt_logits` is `[tokens, vocab_size]` when they were wanted. `cached_images` needed no
    encoding: their features were known, or all their tokens were in the cache.
    """

    queue: float
    encode: float
    prefill: float
    cached_tokens: int
    cached_images: int
    prompt_logits: FloatArray | None


def _nothing() -> None:
    return None


@dataclass(slots=True, eq=False)
class Job:
    """A prepared request: its prompt, its images and who chooses its tokens.

    Attributes:
        taken: Called once, when the job waits no more and its pixels are let go.
    """

    prompt: RenderedPrompt
    images: Sequence[PreparedImage]
    generation: Generation
    taken: Callable[[], None] = _nothing
    submitted: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class _Sequence:
    job: Job
    fresh: bool  # the logits after every token of the prompt are wanted
    length: int  # of the prompt
    admitted: float
    slot: int = -1
    cached: int = 0
    done: int = 0  # tokens in the cache
    given: DecoderInput | None = None
    encode: float = 0.0
    cached_images: int = 0
    next_token: int = -1
    prompt_logits: list[FloatArray] = field(default_factory=list)

    @property
    def prefilling(self) -> bool:
        return self.done < self.length

    @property
    def input(self) -> DecoderInput:
        assert self.given is not None
        return self.given


class Batch:
    """The jobs that wait and those that run, at most `engine.options.slots` of them at once."""

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

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._running or self._waiting)

    def add(self, job: Job) -> None:
        """Queue a job."""
        self._waiting.append(job)

    def step(self) -> None:
        """Run a part of a prompt, and one token of every sequence that has its prompt behind it."""
        self._drop_cancelled()
        prefilling = self._running[-1] if self._running and self._running[-1].prefilling else None
        if prefilling is None and self._waiting and self._table.free:
            prefilling = self._admit(self._waiting.popleft())
        if prefilling is not None:
            self._prefill(prefilling)
        self._decode([s for s in self._running if not s.prefilling])

    def fail_all(self, refusal: Callable[[], Exception]) -> None:
        """End every job, each with an error of its own."""
        jobs = [s.job for s in self._running] + list(self._waiting)
        waited = list(self._waiting)
        self._running.clear()
        self._waiting.clear()
        self._table.reset()
        for job in waited:
            _let_go(job)
        for job in jobs:
            _fail(job, refusal())

    # --- one request after the other ----------------------------------------------------------

    def _drop_cancelled(self) -> None:
        dropped = [job for job in self._waiting if job.cancelled.is_set()]
        for job in dropped:
            self._waiting.remove(job)
            _let_go(job)
            _fail(job, cancelled())
        for sequence in [s for s in self._running if s.job.cancelled.is_set()]:
            if sequence in self._running:  # else it ended with one before it
                self._end(sequence, cancelled())

    def _admit(self, job: Job) -> _Sequence | None:
        try:
            sequence = self._placed(job)
        except BaseException as error:  # noqa: BLE001 - ends this job, whatever it is
            _let_go(job)
            _fail(job, EngineStepError.of(error))
            return None
        self._attempt([sequence], lambda: self._encode(sequence))
        _let_go(job)
        return sequence if sequence in self._running else None

    def _placed(self, job: Job) -> _Sequence:
        """The job in a slot. What the cache has of its prompt decides which images it needs."""
        admitted, fresh = time.perf_counter(), job.generation.wants_prompt_logits
        keys = self._engine.keys(job.prompt, job.images)
        sequence = _Sequence(job, fresh, len(keys), admitted)
        place = self._table.admit(keys, fresh=fresh, salt=self._engine.rotary_level(len(keys)))
        sequence.slot, sequence.cached, sequence.done = place.slot, place.cached, place.cached
        self._running.append(sequence)
        return sequence

    def _encode(self, sequence: _Sequence) -> None:
        job, begun = sequence.job, time.perf_counter()
        needed = [span.start + span.length > sequence.cached for span in job.prompt.image_spans]
        spans = [
            span for span, wanted in zip(job.prompt.image_spans, needed, strict=True) if wanted
        ]
        ahead = [image for waiting in self._waiting for image in waiting.images]
        found, known = self._features.get([job.images[span.image] for span in spans], ahead)
        rows = iter(found)
        features = [next(rows) if wanted else None for wanted in needed]
        sequence.given = self._engine.decoder_input(job.prompt, job.images, features)
        sequence.encode = time.perf_counter() - begun
        sequence.cached_images = known + len(needed) - len(spans)

    def _prefill(self, sequence: _Sequence) -> None:
        logits = self._attempt([sequence], lambda: self._run_chunk(sequence))
        if logits is not None and not sequence.prefilling:
            self._begin(sequence, logits[-1])

    def _run_chunk(self, sequence: _Sequence) -> FloatArray:
        given, start = sequence.input, sequence.done
        stop = min(start + self._chunk, sequence.length)
        logits = self._engine.prefill(sequence.slot, given, start, stop, every=sequence.fresh)
        if not len(logits) and stop == sequence.length:
            raise ValueError("the decoder gave no logits for the end of a prompt")
        self._table.extend(sequence.slot, given.keys[start:stop])
        sequence.done = stop
        if sequence.fresh:
            sequence.prompt_logits.append(logits)
        return logits

    def _begin(self, sequence: _Sequence, logits: FloatArray) -> None:
        try:
            sequence.job.generation.begin(self._facts(sequence))
        except BaseException as error:  # noqa: BLE001 - ends this sequence, whatever it is
            self._end(sequence, as_ours(error))
            return
        self._accept(sequence, logits)

    def _facts(self, sequence: _Sequence) -> PrefillFacts:
        rows, sequence.prompt_logits = sequence.prompt_logits, []
        return PrefillFacts(
            queue=sequence.admitted - sequence.job.submitted,
            encode=sequence.encode,
            prefill=time.perf_counter() - sequence.admitted - sequence.encode,
            cached_tokens=sequence.cached,
            cached_images=sequence.cached_images,
            prompt_logits=np.concatenate(rows) if rows else None,
        )

    def _accept(self, sequence: _Sequence, logits: FloatArray) -> None:
        try:
            token = sequence.job.generation.accept(logits)
            if token is not None:
                sequence.next_token = int(token)
        except BaseException as error:  # noqa: BLE001 - a logits processor may raise anything
            self._end(sequence, error)
            return
        if token is None:
            self._finish(sequence)

    # --- all of them at once ------------------------------------------------------------------

    def _decode(self, sequences: list[_Sequence]) -> None:
        if not sequences:
            return
        logits = self._attempt(sequences, lambda: self._run_tokens(sequences))
        if logits is None:
            return
        # All tokens are noted before the first sequence ends: the last one then moves into its
        # slot, and what the table does not know of would stay behind.
        failed = {sequence: self._noted(sequence) for sequence in sequences}
        for sequence, row in zip(sequences, logits, strict=True):
            error = failed[sequence]
            if sequence not in self._running:
                continue  # it ended with one before it
            if error is not None:
                self._end(sequence, error)
            else:
                self._accept(sequence, row)

    def _run_tokens(self, sequences: list[_Sequence]) -> FloatArray:
        tokens = np.array([s.next_token for s in sequences], np.int64)
        lengths = np.array([s.done for s in sequences], np.int64)
        levels = np.array([s.input.rotary_level for s in sequences], np.int64)
        logits = self._engine.decode(tokens, lengths, levels)
        if len(logits) != len(sequences):
            raise ValueError(f"the decoder gave {len(logits)} rows for {len(sequences)} sequences")
        return logits

    def _noted(self, sequence: _Sequence) -> Exception | None:
        """Note the token that was run; the error if that fails."""
        try:
            self._table.extend(sequence.slot, np.array([sequence.next_token], np.int64))
        except BaseException as error:  # noqa: BLE001 - ends this sequence, whatever it is
            return EngineStepError.of(error)
        sequence.done += 1
        return None

    # --- ends ---------------------------------------------------------------------------------

    def _attempt(self, sequences: Sequence[_Sequence], call: Callable[[], T]) -> T | None:
        """What `call` gives. If it raises, these sequences end, and nothing in their slots counts.

        None then.
        """
        try:
            return call()
        except BaseException as error:  # noqa: BLE001 - handed to the callers that it concerns
            for sequence in sequences:
                self._table.forget(sequence.slot)
            for sequence in sequences:
                if sequence in self._running:  # else it ended with one before it
                    self._end(sequence, EngineStepError.of(error))
            return None

    def _end(self, sequence: _Sequence, error: BaseException) -> None:
        self._finish(sequence)
        _fail(sequence.job, as_exception(error))

    def _finish(self, sequence: _Sequence) -> None:
        """Give up the slot at once: the last sequence moves into it, nobody waits for anybody.

        Decoding runs over the first slots, so a sequence in prefill must stay the last one. Where
        a move fails, the sequence that was moved is lost too and ends with the error.
        """
        last = self._running[-1]
        if last.prefilling and sequence is not last:
            neighbour = self._running[-2]
            try:
                self._trade(sequence, neighbour)
            except BaseException as error:  # noqa: BLE001 - ends the sequence that it concerns
                self._lose(neighbour, sequence, error)
                return
        try:
            moved = self._table.release(sequence.slot)
        except BaseException as error:  # noqa: BLE001 - ends the sequence that it concerns
            self._lose(last, sequence, error)
            return
        self._running.remove(sequence)
        if moved is not None:
            self._running.remove(last)
            last.slot = sequence.slot
            self._running.insert(last.slot, last)

    def _lose(self, moved: _Sequence, sequence: _Sequence, error: BaseException) -> None:
        """The move of `moved` failed while `sequence` was ending: end both.

        Each round ends one more sequence, and the last of all needs no move.
        """
        if moved is sequence:  # nothing had to be moved; a second failure ends the worker
            self._table.release(sequence.slot)
            self._running.remove(sequence)
            return
        self._end(moved, EngineStepError.of(error))
        if sequence in self._running:
            self._finish(sequence)

    def _trade(self, first: _Sequence, second: _Sequence) -> None:
        """Two sequences change places."""
        self._table.exchange(first.slot, second.slot)
        first.slot, second.slot = second.slot, first.slot
        self._running.sort(key=lambda sequence: sequence.slot)


def _fail(job: Job, error: Exception) -> None:
    try:
        job.generation.fail(error)
    except BaseException:  # its caller can be told no more; the others go on
        logger.critical("the end of a request could not be reported: %s", error, exc_info=True)


def _let_go(job: Job) -> None:
    """The job waits no more."""
    job.images = ()
    try:
        job.taken()
    except BaseException:  # the others go on
        logger.critical("a place in the queue was lost", exc_info=True)
