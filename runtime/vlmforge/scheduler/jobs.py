"""Jobs in, steps out of the scheduler and through the runner. No threads: `Loop` has the one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

from vlmforge.backends import KeyValues, LoadOptions
from vlmforge.errors import BackendUnavailableError, EngineStepError
from vlmforge.kv.blocks import BlockPool
from vlmforge.kv.cache import Keys, KVCache
from vlmforge.kv.slots import SlotCache
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.job import Job
from vlmforge.runner.runner import Runner
from vlmforge.runner.running import Running
from vlmforge.runner.stages import Engine
from vlmforge.runner.step import Step, StepResult
from vlmforge.runner.terms import Terms
from vlmforge.scheduler.request import cancelled
from vlmforge.scheduler.scheduler import Scheduler
from vlmforge.scheduler.sequence import SequenceError, State, TokenSequence
from vlmforge.scheduler.together import Together
from vlmforge.vl.prepared import PreparedImage

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
        self._running: Running | None = None  # the step that was begun last, and not finished
        self.preemptions = 0  # of jobs that have ended
        self._forget_cache()

    @property
    def running(self) -> int:
        """Sequences that have a place. From any thread, as the next properties."""
        return len(self._scheduler.running)

    @property
    def used_blocks(self) -> int:
        """Blocks of the cache with tokens in them."""
        return self._cache.used_blocks

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._jobs and self._running is None

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
        for sibling in job.siblings:
            sequence.fork(next(self._ids))
            self._jobs[sequence.forks[-1].id] = sequence.forks[-1], sibling
        self._scheduler.add(sequence)

    def salt(self, prompt_tokens: int, terms: Terms) -> bytes:
        """What a sequence is told by beside its keys: its rotary level and its caller's salt."""
        return str(self._engine.rotary_level(prompt_tokens)).encode() + terms.salt

    def cached(self, keys: Keys, terms: Terms) -> int:
        """How many first tokens of a prompt are in the cache now. From any thread, as a hint."""
        return self._cache.find(keys, salt=self.salt(len(keys), terms))[1] if self._reuse else 0

    def read(self, keys: Keys, salt: bytes) -> KeyValues:
        """A copy of what the cache has of the longest beginning of `keys`; empty: nothing."""
        self._carry_out()
        place, tokens = self._cache.find(keys, salt=salt)
        return self._engine.decoder.read(place, tokens) if tokens else {}

    def write(self, keys: Keys, salt: bytes, rows: KeyValues) -> bool:
        """Put what was read under `keys` into the cache, for whoever begins so.

        False when that would take the place of sequences that run, or nothing is kept here.

        Raises: see `DecoderSession.write`.
        """
        if not self._reuse or not self._cache.fits(len(keys)):
            return False
        sequence, cache = next(self._ids), self._cache  # of a failure nothing is left but a new one
        start = cache.begin(sequence, keys, salt=salt, reuse=True)
        if start is None:
            return False
        written = False
        try:
            if cache.grow(sequence, len(keys)):
                self._carry_out()
                self._engine.decoder.write(cache.place(sequence), rows, start)
                cache.note(sequence, keys[start:])
                written = True
        finally:
            cache.free(sequence, valid=written)
        return written

    def _carry_out(self) -> None:
        """What the cache's bookkeeping asks for, without a step; if that fails, nobody knows."""
        try:
            for move in self._cache.take_moves():
                self._engine.decoder.move(move)
        except BaseException as error:
            cause = error
            self.fail_all(lambda: EngineStepError.of(cause))
            raise

    def step(self) -> None:
        """Run a part of a prompt, and one token of every sequence that has its prompt behind it.

        Where the next such step may be begun before this one has ended, it has been.
        """
        self._guarded(self._next_step)

    def settle(self) -> None:
        """Return when nothing runs."""
        self._guarded(self._settle)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # nobody knows whom it concerns
            logger.critical("a step could not be planned", exc_info=True)
            cause = error
            self.fail_all(lambda: EngineStepError.of(cause))

    def fail_all(self, refusal: Callable[[], Exception]) -> None:
        """End every job, each with an error of its own."""
        jobs = [job for _, job in self._jobs.values()]
        for sequence in list(self._jobs):
            self._forget(sequence)
        if self._running is not None:  # it writes to the cache
            self._runner.finish(self._running)
        self._running = None
        self._forget_cache()
        for job in jobs:
            job.let_go()
        for job in jobs:
            job.fail(refusal())

    def _next_step(self) -> None:
        self._drop_unwanted()
        if self._running is None:
            self._begin()
        if (running := self._running) is None:
            return
        broken = None
        try:
            self._running = self._begun_behind(running)
        except SequenceError as error:
            self._running, broken = None, error
        self._update(running.step, self._runner.finish(running))
        if broken is not None and broken.sequence.state is not State.ENDED:
            self._broken(broken)

    def _begin(self) -> None:
        """Begin the next step, or run it where that must be waited for."""
        try:
            step = self._scheduler.schedule()
        except SequenceError as error:
            self._broken(error)
            return
        if step is None:
            return
        self._admit(step)
        every = step.prefill is not None and any(row.logits == "all" for row in step.prompts)
        names = (row.sequence for row in step.decode)
        choices = None if every else self._runner.ahead(names)
        if choices is None:
            self._update(step, self._runner.run(step, self._images()))
        else:
            self._running = self._runner.start(step, choices, None, self._images())

    def _begun_behind(self, running: Running) -> Running | None:
        """The step behind one that runs, begun, if what it is does not depend on that."""
        choices = self._runner.ahead(self._scheduler.behind(running.step), running)
        step = None if choices is None else self._scheduler.ahead(running.step, choices)
        if step is None or choices is None:
            return None
        self._admit(step)
        return self._runner.start(step, choices, running, self._images())

    def _admit(self, step: Step) -> None:
        for prompt in step.prompts:
            if not self._runner.has(prompt.sequence):
                sequence, job = self._jobs[prompt.sequence]
                self._runner.begin(sequence.id, job, sequence.cached)

    def _images(self) -> Iterator[PreparedImage]:
        """Those of who waits, in turn."""
        for sequence in self._scheduler.waiting:
            yield from self._jobs[sequence.id][1].images

    def _settle(self) -> None:
        if (running := self._running) is not None:
            self._running = None
            self._update(running.step, self._runner.finish(running))

    def _update(self, step: Step, result: StepResult) -> None:
        for lost in self._scheduler.update(step, result):
            self._lost(lost)
        for sequence, _ in list(self._jobs.values()):
            if sequence.state is State.ENDED:
                self._forget(sequence.id)

    def _broken(self, error: SequenceError) -> None:
        """The cache failed when a step was planned, of which nothing runs."""
        self._scheduler.remove(error.sequence, valid=False)
        self._lost(error)

    def _lost(self, error: SequenceError) -> None:
        """The cache failed at a sequence that has ended, and those with it that had not parted."""
        for sequence in (error.sequence, *error.sequence.forks):
            if sequence.id in self._jobs:
                job = self._jobs[sequence.id][1]
                self._forget(sequence.id)
                job.let_go()
                job.fail(EngineStepError.of(error.__cause__ or error))

    def _drop_unwanted(self) -> None:
        for sequence, job in list(self._jobs.values()):
            over = job.terms.over
            if over or job.cancelled.is_set():
                self._scheduler.remove(sequence)
                self._forget(sequence.id)
                job.let_go()
                job.fail(job.terms.timed_out() if over else cancelled())

    def _forget(self, sequence: int) -> None:
        self._runner.end(sequence)
        self.preemptions += self._jobs.pop(sequence)[0].preempted

    def _forget_cache(self) -> None:
        options = self._engine.options
        self._cache = _cache(options, self._reuse)
        self._scheduler = Scheduler(
            self._cache,
            rows=options.slots,
            chunk=self._chunk,
            together=Together(
                self._chunk,
                options.prompts,
                options.packs,
                options.capacity,
                options.apart,
            ),
        )

    def _sequence(self, job: Job) -> TokenSequence:
        tokens = list(job.prompt.token_ids)
        return TokenSequence(
            next(self._ids),
            tokens,
            self._engine.keys(job.prompt, job.images),
            salt=self.salt(len(tokens), job.terms),
            priority=job.terms.priority,
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


def _cache(options: LoadOptions, reuse: bool) -> KVCache:
    if options.paged:
        return BlockPool(options.blocks, options.block_size, reuse=reuse)
    return SlotCache(
        options.slots,
        options.capacity,
        budget=options.blocks,
        block_size=options.block_size,
        reuse=reuse,
    )
