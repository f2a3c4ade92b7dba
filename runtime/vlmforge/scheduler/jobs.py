"""Jobs in, steps out of the scheduler and through the runner. No threads: `Loop` has the one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

from vlmforge.errors import BackendUnavailableError, EngineStepError
from vlmforge.kv.slots import SlotCache
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.job import Job
from vlmforge.runner.runner import Runner
from vlmforge.runner.stages import Engine
from vlmforge.scheduler.request import cancelled
from vlmforge.scheduler.scheduler import Scheduler, SequenceError
from vlmforge.scheduler.sequence import State, TokenSequence

logger = logging.getLogger("vlmforge")


class Jobs:
    """The jobs that wait and those that run."""

    def __init__(
        self, engine: Engine, features: FeatureCache, *, chunk: int, reuse_prefixes: bool
    ) -> None:
        self._engine, self._chunk, self._reuse = engine, chunk, reuse_prefixes
        self._runner = Runner(engine, features)
        self._ids = itertools.count()
        self._jobs: dict[int, tuple[TokenSequence, Job]] = {}
        self._forget_cache()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._jobs

    def add(self, job: Job) -> None:
        """Queue a job; one that can never run fails at once."""
        try:
            sequence = self._sequence(job)
            fits = self._cache.fits(len(sequence.tokens) + 1)
        except BaseException as error:  # noqa: BLE001 - ends this job, whatever it is
            job.let_go()
            job.fail(EngineStepError.of(error))
            return
        if not fits:
            job.let_go()
            job.fail(self._too_long(len(sequence.tokens)))
            return
        self._jobs[sequence.id] = sequence, job
        self._scheduler.add(sequence)

    def step(self) -> None:
        """Run a part of a prompt, and one token of every sequence that has its prompt behind it."""
        try:
            self._drop_cancelled()
            self._step()
        except BaseException as error:  # nobody knows whom it concerns
            logger.critical("a step could not be planned", exc_info=True)
            cause = error
            self.fail_all(lambda: EngineStepError.of(cause))

    def fail_all(self, refusal: Callable[[], Exception]) -> None:
        """End every job, each with an error of its own."""
        jobs = [job for _, job in self._jobs.values()]
        for sequence in list(self._jobs):
            self._forget(sequence)
        self._forget_cache()
        for job in jobs:
            job.let_go()
        for job in jobs:
            job.fail(refusal())

    def _step(self) -> None:
        try:
            step = self._scheduler.schedule()
        except SequenceError as error:
            self._scheduler.remove(error.sequence, valid=False)
            self._lost(error)
            return
        if step is None:
            return
        prompt = step.prefill
        if prompt is not None and not self._runner.has(prompt.sequence):
            sequence, job = self._jobs[prompt.sequence]
            self._runner.begin(sequence.id, job, sequence.cached)
        waiting = [self._jobs[sequence.id][1] for sequence in self._scheduler.waiting]
        ahead = (image for job in waiting for image in job.images)
        for lost in self._scheduler.update(step, self._runner.run(step, ahead)):
            self._lost(lost)
        for row in step.rows:
            if row.sequence in self._jobs and self._jobs[row.sequence][0].state is State.ENDED:
                self._forget(row.sequence)

    def _lost(self, error: SequenceError) -> None:
        """The cache failed at a sequence that has ended."""
        job = self._jobs[error.sequence.id][1]
        self._forget(error.sequence.id)
        job.let_go()
        job.fail(EngineStepError.of(error.__cause__ or error))

    def _drop_cancelled(self) -> None:
        for sequence, job in list(self._jobs.values()):
            if job.cancelled.is_set():
                self._scheduler.remove(sequence)
                self._forget(sequence.id)
                job.let_go()
                job.fail(cancelled())

    def _forget(self, sequence: int) -> None:
        self._runner.end(sequence)
        del self._jobs[sequence]

    def _forget_cache(self) -> None:
        options = self._engine.options
        self._cache = SlotCache(
            options.slots,
            options.capacity,
            budget=options.blocks,
            block_size=options.block_size,
            reuse=self._reuse,
        )
        self._scheduler = Scheduler(self._cache, rows=options.slots, chunk=self._chunk)

    def _sequence(self, job: Job) -> TokenSequence:
        tokens = list(job.prompt.token_ids)
        level = self._engine.rotary_level(len(tokens))
        return TokenSequence(
            next(self._ids),
            tokens,
            self._engine.keys(job.prompt, job.images),
            salt=str(level).encode(),
            fresh=job.generation.wants_prompt_logits,
        )

    def _too_long(self, tokens: int) -> BackendUnavailableError:
        options = self._engine.options
        return BackendUnavailableError(
            "The request does not fit the memory of the key/value cache.",
            found=f"a prompt of {tokens} tokens",
            expected=f"at most {options.blocks * options.block_size - 1} tokens",
            fix="free memory, or send fewer or smaller images or a shorter text",
        )
