"""The worker: one thread owns the decoder and runs what callers submit.

Callers talk to it through an inbox, so nothing that it works on is shared. When it ends, for
whatever reason, everybody who waits for it is told, and everybody who comes later is refused.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from typing_extensions import override

from vlmforge import lifetime
from vlmforge.backends import ClosableDecoder, FloatArray
from vlmforge.backends.features import Features
from vlmforge.errors import CancelledError, PipelineError, VlmforgeError
from vlmforge.kv.cache import Keys
from vlmforge.limits import return_freed_memory
from vlmforge.outputs.metrics import Metrics
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.job import Job
from vlmforge.runner.stages import Engine
from vlmforge.runner.terms import Terms
from vlmforge.scheduler.jobs import Jobs
from vlmforge.scheduler.meter import Meter

logger = logging.getLogger("vlmforge")
T = TypeVar("T")


class Loop(lifetime.Owner):
    """Runs jobs on an engine, at most `engine.options.slots` of them at once."""

    def __init__(
        self, engine: Engine, features: FeatureCache, *, chunk: int, reuse_prefixes: bool
    ) -> None:
        self._engine, self._features = engine, features
        self._jobs = Jobs(engine, features, chunk=chunk, reuse_prefixes=reuse_prefixes)
        self.meter = Meter(engine.clock)
        self._inbox: queue.SimpleQueue[Job | _Question[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._refusal: Callable[[], VlmforgeError] | None = None
        self._stopping = False
        self._forks = lifetime.fork_count()
        self._thread = threading.Thread(target=self._work, name="vlmforge", daemon=True)
        self._thread.start()
        lifetime.watch(self)

    @property
    def forked(self) -> bool:
        """Whether this process is a child of the one that has the worker."""
        return self._forks != lifetime.fork_count()

    def known_features(self, digest: bytes) -> Features | None:
        """Features of an image that was encoded before, if they are kept. From any thread."""
        return self._features.known(digest)

    def cached(self, keys: Keys, terms: Terms) -> int:
        """How many first tokens of a prompt are in the cache now. From any thread, as a hint."""
        return self._jobs.cached(keys, terms)

    def metrics(self) -> Metrics:
        """What has been counted, and what is going on. From any thread; waits for nobody."""
        meter, jobs, options = self.meter, self._jobs, self._engine.options
        running = jobs.running
        return Metrics(
            requests=meter.counted("how"),
            errors=meter.counted("errors"),
            prompt_tokens=meter.total("prompt_tokens"),
            cached_tokens=meter.total("cached_tokens"),
            generated_tokens=meter.total("generated_tokens"),
            images_encoded=self._features.encoded,
            images_cached=meter.total("images_cached"),
            preemptions=jobs.preemptions,
            waiting=max(0, meter.under_way - running),
            running=running,
            blocks_used=jobs.used_blocks,
            blocks_total=options.blocks,
            step_seconds=meter.steps.now(),
            step_host_share=meter.shares.now(),
            first_token_seconds=meter.first_token.now(),
            between_tokens_seconds=meter.between_tokens.now(),
            request_seconds=meter.request_seconds(),
        )

    def check(self) -> None:
        """Refuse a caller who would wait for ever, or for nothing.

        Raises:
            PipelineError: in a forked child, from the worker's own thread, or the worker died.
            CancelledError: once the loop is closed.
        """
        self.check_process()
        if threading.current_thread() is self._thread:
            raise _called_by_itself()
        if self._refusal is not None:
            raise self._refusal()

    def check_process(self) -> None:
        """PipelineError in a forked child."""
        if self.forked:
            raise _forked()

    def submit(self, job: Job) -> None:
        """Queue a job (see `check`)."""
        self._put(job)

    def _put(self, item: Job | _Question[Any]) -> None:
        self.check()
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            self._inbox.put(item)

    def ask(self, question: Callable[[Jobs], T]) -> T:
        """What `question` gives or raises, asked by the worker between two steps (see `check`)."""
        asked = _Question(question)
        self._put(asked)
        return asked.answer.result()

    def keep_features(self, digest: bytes, features: FloatArray) -> None:
        """Take in features that were computed earlier (see `check`)."""
        self.ask(lambda _: self._features.keep(digest, features))

    def cancel(self, job: Job) -> None:
        """End a job at its next step; its generation fails with `CancelledError`."""
        job.cancelled.set()
        self.wake()

    def wake(self) -> None:
        """Have the worker look at what was cancelled."""
        if not self.forked:
            self._inbox.put(None)

    def stop(self) -> None:
        """Have the worker cancel what is in flight and end, without waiting for it.

        Takes no lock: a garbage collector may call it anywhere.
        """
        self._stopping = True
        self.wake()

    def close(self) -> None:
        """Cancel what is in flight and end the worker. May be called more than once."""
        if self.forked:
            return
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    end = close

    @override
    def abandon(self) -> None:
        """Where the engine is freed, libraries wait for their threads."""
        lifetime.keep_for_ever(self._engine)

    def _work(self) -> None:
        refusal: Callable[[], VlmforgeError] = closed
        try:
            self.meter.begin()
            while self._receive():
                with self.meter.step():
                    self._jobs.step()
        except BaseException as error:  # told to every caller, now and later
            logger.critical("the worker of a pipeline died", exc_info=True)
            refusal = _Died(error)
        with self._lock:
            self._refusal = refusal
        left = self._left()  # nothing comes behind these
        self._jobs.fail_all(refusal)
        for job in left:
            job.let_go()
            job.fail(refusal())
        self._features.let_go()  # now, not when nobody has this any more
        if isinstance(self._engine.decoder, ClosableDecoder):
            self._engine.decoder.close()
        self._engine.let_go()
        return_freed_memory()

    def _receive(self) -> bool:
        """Take what callers sent, waiting when there is nothing to do; False at the end."""
        self._take(block=self._jobs.idle)
        return not self._stopping

    def _take(self, *, block: bool) -> None:
        while block or not self._inbox.empty():  # nobody else takes from it
            item, block = self._inbox.get(), False
            if item is not None:
                self._handle(item)

    def _handle(self, item: Job | _Question[Any]) -> None:
        if isinstance(item, _Question):
            self._jobs.settle()
            item.put(self._jobs, self._refusal)
            return
        try:
            self._jobs.add(item)
        except BaseException:
            self._inbox.put(item)  # it ends with the others
            raise

    def _left(self) -> list[Job]:
        """Jobs that were never taken in; questions are refused."""
        left = []
        while not self._inbox.empty():  # nobody else takes from it
            item = self._inbox.get()
            if isinstance(item, _Question):
                item.put(self._jobs, self._refusal)
            elif item is not None:
                left.append(item)
        return left


class _Question(Generic[T]):
    """What somebody wants of the worker's own things, and waits for."""

    def __init__(self, question: Callable[[Jobs], T]) -> None:
        self._question = question
        self.answer: Future[T] = Future()

    def put(self, jobs: Jobs, refusal: Callable[[], VlmforgeError] | None) -> None:
        """Answer it; `refusal`: the worker is at its end."""
        try:
            if refusal is not None:
                raise refusal()
            self.answer.set_result(self._question(jobs))
        except BaseException as error:  # noqa: BLE001 - raised where it was asked
            self.answer.set_exception(error)


class _Died:
    """Makes the error of each caller of a worker that is no more."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __call__(self) -> VlmforgeError:
        refusal = PipelineError(
            "The pipeline's worker has died; it answers no more requests.",
            found=f"{type(self._error).__name__}: {self._error}",
            expected="a worker that outlives every request",
            fix="make a new pipeline: pipeline(ENGINE); and please report this",
        )
        refusal.__cause__ = self._error
        return refusal


def closed() -> CancelledError:
    """What ends the requests of a pipeline that is closed."""
    return CancelledError(
        "The pipeline is closed.",
        found="a request to a closed pipeline",
        expected="requests before close(), inside the with block",
        fix="make a new one: pipeline(ENGINE)",
    )


def _forked() -> PipelineError:
    return PipelineError(
        "The pipeline was made before this process was forked.",
        found="a call in a child of the process that made it: its threads are not there",
        expected="calls in the process that made the pipeline",
        fix="make the pipeline after the fork, in the child (gunicorn: without --preload; "
        "multiprocessing: in the worker's initializer, or with the start method 'spawn')",
    )


def _called_by_itself() -> PipelineError:
    return PipelineError(
        "The pipeline was called by a function that it is calling.",
        found="a call from inside a logits processor: the answer would wait for itself",
        expected="calls from threads of your own",
        fix="ask before the request, or use a second pipeline inside the processor",
    )
