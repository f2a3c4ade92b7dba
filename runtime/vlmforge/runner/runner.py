"""Steps to tokens: arrays for the decoder, features for the images, logits to whoever chooses.

Whatever is raised by a call that is made here, by the engine, a cache or a caller's own function,
ends the sequences that the call was made for, and no others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from vlmforge.backends.choice import Begun, Picked
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.job import Job
from vlmforge.runner.running import Active, Choices, Running
from vlmforge.runner.stages import Engine
from vlmforge.runner.step import Row, Step, StepRecord, StepResult
from vlmforge.runner.work import Work, check_logits
from vlmforge.vl.prepared import PreparedImage

logger, steps = logging.getLogger("vlmforge"), logging.getLogger("vlmforge.steps")
T = TypeVar("T")


class Runner:
    """Runs the steps of one engine. One thread.

    A step is `run`; or begun, and finished later: in between, the one behind it may be begun.
    """

    def __init__(self, engine: Engine, features: FeatureCache) -> None:
        self._engine, self._features = engine, features
        self._active: dict[int, Active] = {}

    def begin(self, sequence: int, job: Job, cached: int) -> None:
        """A job has got its place, for the first time; `cached` of its tokens are there."""
        images: list[PreparedImage | None] = [*job.images]
        self._active[sequence] = Active(
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
        work = Work(self._engine, self._features, self._active)
        begun = time.perf_counter()
        for lost in work.move(step):
            work.lose(*lost)
        work.prefill(step.prompts, ahead)
        prompted = time.perf_counter()
        work.decode(step.decode)
        if steps.isEnabledFor(logging.DEBUG):
            prompt, decode = prompted - begun - work.encode, time.perf_counter() - prompted
            steps.debug("%s", StepRecord(step, begun, work.images, work.encode, prompt, decode))
        return StepResult(work.tokens, frozenset(work.failed))

    def ahead(self, names: Iterable[int], before: Running | None = None) -> Choices | None:
        """How the next tokens of these sequences are chosen in a step that is begun.

        `before` runs still: of those with a row in it the token behind that one's, but for those
        that surely end with it, and those for which it must be known. None: the step is to be
        `run`, when that has ended.
        """
        overlapping = self._engine.overlapping
        if overlapping is None or (before is not None and before.failed):
            return None
        behind = frozenset[int]() if before is None else before.places.keys()
        prompts = () if before is None else {row.sequence for row in before.prompts} - behind
        jobs = dict[int, Job]()
        for name in names:
            active = self._active.get(name)
            if active is None or name in prompts:
                continue
            if active.here:
                return None
            if name not in behind or active.job.generation.left > 1:
                jobs[name] = active.job
        choices = _choices(jobs, behind)
        if choices is None:
            return None
        known = [choice for choice in choices.values() if choice is not None]
        return choices if overlapping.can_begin(len(choices), known or None) else None

    def start(
        self,
        step: Step,
        choices: Choices,
        before: Running | None = None,
        ahead: Iterable[PreparedImage] = (),
    ) -> Running:
        """Begin a step; raises nothing (see `finish`). `ahead`: as for `run`."""
        work = Work(self._engine, self._features, self._active)
        begun, lost = time.perf_counter(), [*work.move(step)]
        gone = {row.sequence for rows, _ in lost for row in rows}
        prompts, ahead = [], work.images_of(step.prompts, ahead)
        for row in step.prompts:
            error = None if row.sequence in gone else work.encoded(row, ahead)
            if error is not None:
                lost.append(([row], error))
            elif row.sequence not in gone:
                prompts.append(row)
        rows = [row for row in step.decode if row.sequence not in gone]
        first = work.first(prompts)
        found: Begun[Sequence[Picked | np.int64 | None]] | BaseException | None = None
        logits: Begun[Sequence[Any]] | BaseException | None = None
        if mixed := bool(prompts and rows) and work.mixes(prompts, first):
            both = _tried(lambda: work.begin_mixed(prompts, first, rows, choices, before))
            logits, found = (both, both) if isinstance(both, BaseException) else both
        else:
            # Tokens first: those of the prompts of `before` are there until others are begun.
            found = _tried(lambda: work.begin_tokens(rows, choices, before)) if rows else None
            logits = _tried(lambda: work.begin_prompts(prompts, first)) if prompts else None
        done = work.images, work.encode
        named = frozenset(first)
        return Running(step, begun, lost, prompts, rows, named, mixed, logits, found, *done)

    def finish(self, running: Running) -> StepResult:
        """Wait for a step; raises nothing, as `run`. Who has ended meanwhile gets nothing of it."""
        work, there = Work(self._engine, self._features, self._active), self._active.keys()
        for rows, error in running.lost:
            work.lose([row for row in rows if row.sequence in there], error)
        for row, found in self._found(work, running.rows, running.found):
            if row.sequence in there:
                work.take(row.sequence, found)
        for row, given in self._found(work, running.prompts, running.logits):
            if row.sequence in there:
                work.prompted(row, given)
                if row.sequence in running.first and isinstance(given, np.ndarray):
                    work.decided_here(row.sequence)
        if steps.isEnabledFor(logging.DEBUG):
            steps.debug("%s", running.record())
        return StepResult(work.tokens, frozenset(work.failed), frozenset(work.again))

    def _found(
        self, work: Work, rows: Sequence[Row], begun: Begun[Sequence[T]] | BaseException | None
    ) -> Iterable[tuple[Row, T]]:
        """Each row with what was found for it; nothing, if they are lost."""

        def wait() -> Sequence[T]:
            if isinstance(begun, BaseException):
                raise begun
            assert begun is not None
            found = begun.wait()
            self._engine.clock.add(begun.seconds)
            if len(found) != len(rows):
                raise ValueError(f"the decoder gave {len(found)} rows for {len(rows)} sequences")
            check_logits(rows, found)
            return found

        if begun is None:
            return ()
        found = work.attempt([row for row in rows if row.sequence in self._active], wait)
        return () if found is None else zip(rows, found, strict=True)


def _tried(call: Callable[[], T]) -> T | BaseException:
    """What `call` gives, or raises: for the callers whom it concerns, when it is waited for."""
    try:
        return call()
    except BaseException as error:  # noqa: BLE001 - see above
        return error


def _choices(jobs: Mapping[int, Job], behind: Collection[int]) -> Choices | None:
    """Of each job's next token, or of the one behind; nothing to be said where that is likeliest.

    Left out are those for which the one before must be known. None: the logits of one must be.
    """
    if all(job.likeliest for job in jobs.values()):
        return dict.fromkeys(jobs)
    try:
        choices = {name: job.generation.choice(int(name in behind)) for name, job in jobs.items()}
    except BaseException:  # noqa: BLE001 - where the step is run, whom it concerns is told
        return None
    if any(choice is None and name not in behind for name, choice in choices.items()):
        return None
    return {name: choice for name, choice in choices.items() if choice is not None}
