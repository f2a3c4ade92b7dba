"""Steps to tokens: arrays for the decoder, features for the images, logits to whoever chooses.

Whatever is raised by a call that is made here, by the engine, a cache or a caller's own function,
ends the sequences that the call was made for, and no others.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from vlmforge.backends import FloatArray
from vlmforge.backends.choice import Choice, Found
from vlmforge.errors import EngineStepError, as_ours
from vlmforge.kv.cache import Copy
from vlmforge.outputs.token_chooser import PrefillFacts
from vlmforge.runner.decoder_input import DecoderInput, PromptPart
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.job import Job
from vlmforge.runner.stages import Engine
from vlmforge.runner.step import Row, Step, StepRecord, StepResult
from vlmforge.vl.prepared import PreparedImage

logger, steps = logging.getLogger("vlmforge"), logging.getLogger("vlmforge.steps")
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Active:
    """A job that has a place, or has lost it for a while."""

    job: Job
    images: list[PreparedImage | None]  # let go once their features are here
    features: list[FloatArray | None]  # by image
    admitted: float
    cached: int
    given: DecoderInput | None = None
    encode: float = 0.0
    cached_images: int = 0
    begun: bool = False
    prompt_logits: list[FloatArray] = field(default_factory=list)

    @property
    def input(self) -> DecoderInput:
        assert self.given is not None
        return self.given


class Runner:
    """Runs the steps of one engine. One thread."""

    def __init__(self, engine: Engine, features: FeatureCache) -> None:
        self._engine, self._features = engine, features
        self._active: dict[int, _Active] = {}

    def begin(self, sequence: int, job: Job, cached: int) -> None:
        """A job has got its place, for the first time; `cached` of its tokens are there."""
        images: list[PreparedImage | None] = [*job.images]
        self._active[sequence] = _Active(
            job, images, [None] * len(images), time.perf_counter(), cached
        )
        job.images = ()
        job.let_go()

    def has(self, sequence: int) -> bool:
        """Whether the job has begun and has not ended."""
        return sequence in self._active

    def end(self, sequence: int) -> None:
        """Forget a job."""
        self._active.pop(sequence, None)

    def run(self, step: Step, ahead: Iterable[PreparedImage] = ()) -> StepResult:
        """Run a step; raises nothing: what goes wrong ends the jobs that it concerns.

        Args:
            step: What the scheduler planned.
            ahead: Images that will be asked for next, to fill up a run of the vision part.
        """
        work = _Work(self._engine, self._features, self._active)
        begun = time.perf_counter()
        work.move(step)
        work.prefill(step.prompts, ahead)
        prompted = time.perf_counter()
        work.decode(step.decode)
        if steps.isEnabledFor(logging.DEBUG):
            prompt, decode = prompted - begun - work.encode, time.perf_counter() - prompted
            steps.debug("%s", StepRecord(step, begun, work.images, work.encode, prompt, decode))
        return StepResult(work.tokens, frozenset(work.failed))


@dataclass(slots=True)
class _Work:
    """One step."""

    engine: Engine
    cache: FeatureCache
    active: dict[int, _Active]
    tokens: dict[int, int | None] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    images: int = 0
    encode: float = 0.0

    def move(self, step: Step) -> None:
        for move in step.moves:
            try:
                self.engine.decoder.move(move)
            except BaseException as error:
                if isinstance(move, Copy):
                    self._lose([row for row in step.rows if move.target in row.place], error)
                else:  # memory that did not go back; its content is of no use anyway
                    logger.warning("the cache's memory could not be given back", exc_info=True)

    def prefill(self, rows: Sequence[Row], ahead: Iterable[PreparedImage]) -> None:
        ready = []
        for row in rows:
            if row.sequence in self.failed:
                continue
            if self._attempt([row], partial(self._encode, self.active[row.sequence], row, ahead)):
                ready.append(row)
        if not ready:
            return
        logits = self._attempt(ready, lambda: self._run_prompts(ready))
        for row, found in zip(ready, logits or (), strict=logits is not None):
            self._prompted(row, found)

    def _prompted(self, row: Row, logits: FloatArray) -> None:
        """A part of a prompt has been run, and gave logits `[n, vocab_size]`."""
        active = self.active[row.sequence]
        if row.logits == "all":
            active.prompt_logits = active.prompt_logits if row.start else []
            active.prompt_logits.append(logits)
        if row.logits == "none" or not self._ends_prompt(active, row):
            return
        if active.begun:
            self._accept(row.sequence, logits[-1])
            return
        facts = self._facts(active)
        for sequence in (row.sequence, *self._part(row, active)):
            if self._begin(sequence, facts):
                self._accept(sequence, logits[-1])

    def _part(self, row: Row, active: _Active) -> tuple[int, ...]:
        """Other answers to the prompt become jobs of their own; returns their sequences."""
        jobs, active.job.siblings = active.job.siblings, ()
        for fork, job in zip(row.forks, jobs, strict=True):
            self.active[fork] = dataclasses.replace(
                active, job=job, images=list(active.images), features=list(active.features)
            )
        return row.forks

    def decode(self, rows: Sequence[Row]) -> None:
        rows = [row for row in rows if row.sequence not in self.failed]
        choices = self._choices(rows)
        if choices is not None:
            rows = [row for row in rows if row.sequence in choices]
        if not rows:
            return
        found = self._attempt(rows, lambda: self._run_tokens(rows, choices))
        if found is None:
            return
        for row, values in zip(rows, found, strict=True):
            self._accept(row.sequence, values)

    def _ends_prompt(self, active: _Active, row: Row) -> bool:
        return row.logits == "last" or row.stop == len(active.job.prompt.token_ids)

    def _encode(self, active: _Active, row: Row, ahead: Iterable[PreparedImage]) -> bool:
        """Have the features of all images whose tokens are not in the cache; True."""
        begun, spans = time.perf_counter(), active.job.prompt.image_spans
        wanted = {span.image for span in spans if span.start + span.length > row.start}
        needed = [index for index in sorted(wanted) if active.features[index] is None]
        images = [image for index in needed if (image := active.images[index]) is not None]
        found, known = self.cache.get(images, list(ahead)) if images else ([], 0)
        for index, features in zip(needed, found, strict=True):
            active.features[index], active.images[index] = features, None
        if active.given is None:
            active.cached_images = known + len(active.features) - len(needed)
        if needed or active.given is None:
            active.given = self.engine.decoder_input(active.job.prompt, active.features)
        took = time.perf_counter() - begun
        self.images, self.encode = self.images + len(images) - known, self.encode + took
        active.encode += took
        return True

    def _run_prompts(self, rows: Sequence[Row]) -> list[FloatArray]:
        """Of each, its logits."""
        if len(rows) > 1:
            parts = [PromptPart(row.place, self._chunk(row), row.start) for row in rows]
            found = [row[None] for row in self.engine.prefill_together(parts)]
        else:
            (row,) = rows
            chunk, logits = self._chunk(row), row.logits
            found = [self.engine.prefill(row.place, chunk, row.start, logits=logits)]
        for row, given in zip(rows, found, strict=True):
            if not len(given) and row.logits != "none":
                raise ValueError("the decoder gave no logits for the end of a prompt")
        return found

    def _chunk(self, row: Row) -> DecoderInput:
        given = self.active[row.sequence].input
        # Behind the prompt are tokens that were generated before the sequence lost its place.
        prompt = given.ids[row.start : row.stop]
        ids = np.concatenate((prompt, np.array(row.tokens[len(prompt) :], np.int64)))
        return dataclasses.replace(given, ids=ids)

    def _choices(self, rows: Sequence[Row]) -> Mapping[int, Choice | None] | None:
        """How tokens are to be chosen, by sequence, where that is not done here."""
        jobs = {row.sequence: self.active[row.sequence].job for row in rows}
        if self.engine.choosing is None or all(job.likeliest for job in jobs.values()):
            return None
        found: dict[int, Choice | None] = {}
        for row in rows:
            try:
                found[row.sequence] = jobs[row.sequence].generation.choice()
            except BaseException as error:  # noqa: BLE001 - ends this sequence, whatever it is
                self._lose([row], error)
        return found

    def _run_tokens(
        self, rows: Sequence[Row], choices: Mapping[int, Choice | None] | None
    ) -> Sequence[Found]:
        tokens = np.array([row.tokens[0] for row in rows], np.int64)
        lengths = np.array([row.start for row in rows], np.int64)
        inputs = [self.active[row.sequence].input for row in rows]
        levels = np.array([given.rotary_level for given in inputs], np.int64)
        lags = np.array([given.lag for given in inputs], np.int64)
        places = [row.place for row in rows]
        likeliest = all(self.active[row.sequence].job.likeliest for row in rows)
        given = None if choices is None else [choices[row.sequence] for row in rows]
        found = self.engine.decode(
            places, tokens, lengths, levels, lags, likeliest=likeliest, choices=given
        )
        if len(found) != len(rows):
            raise ValueError(f"the decoder gave {len(found)} rows for {len(rows)} sequences")
        return found

    def _facts(self, active: _Active) -> PrefillFacts:
        rows, active.prompt_logits = active.prompt_logits, []
        return PrefillFacts(
            queue=active.admitted - active.job.submitted,
            encode=active.encode,
            prefill=time.perf_counter() - active.admitted - active.encode,
            cached_tokens=active.cached,
            cached_images=active.cached_images,
            prompt_logits=np.concatenate(rows) if rows else None,
        )

    def _begin(self, sequence: int, facts: PrefillFacts) -> bool:
        active = self.active[sequence]
        try:
            active.job.generation.begin(facts)
        except BaseException as error:  # noqa: BLE001 - ends this sequence, whatever it is
            self._end(sequence, as_ours(error))
            return False
        active.begun = True
        return True

    def _accept(self, sequence: int, found: Found) -> None:
        try:
            token = self.active[sequence].job.generation.accept(found)
            self.tokens[sequence] = None if token is None else int(token)
        except BaseException as error:  # noqa: BLE001 - a logits processor may raise anything
            self._end(sequence, error)

    def _attempt(self, rows: Sequence[Row], call: Callable[[], T]) -> T | None:
        """What `call` gives. If it raises, these rows fail; None then."""
        try:
            return call()
        except BaseException as error:  # noqa: BLE001 - handed to the callers that it concerns
            self._lose(rows, error)
            return None

    def _lose(self, rows: Sequence[Row], error: BaseException) -> None:
        """Nobody knows what these sequences have in the cache: they end."""
        for row in rows:
            self.failed.add(row.sequence)
            self.active[row.sequence].job.fail(EngineStepError.of(error))

    def _end(self, sequence: int, error: BaseException) -> None:
        """The answer ends with an error; what is in the cache is whole."""
        self.tokens[sequence] = None
        self.active[sequence].job.fail(error)
