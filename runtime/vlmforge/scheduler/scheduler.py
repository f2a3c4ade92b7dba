"""Which tokens run next. No threads, no arrays of numbers, no devices: state in, `Step` out.

Continuous batching: while requests decode, the prompt of one more is run in chunks beside them.
Higher priorities go first; within one, first come, first served. When the cache is full, whoever
would be served last gives up its place and is computed again later, generated tokens included.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from vlmforge.kv.cache import KVCache
from vlmforge.scheduler.request import Request, Row, State, Step, StepResult


class Scheduler:
    """Plans steps of at most `rows` requests; prompts run `chunk` tokens at a time."""

    def __init__(self, cache: KVCache, *, rows: int, chunk: int) -> None:
        self._cache, self._rows, self._chunk = cache, rows, chunk
        self._waiting: list[Request] = []  # in the order in which they will be served
        self._running: list[Request] = []  # likewise

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests without a place, next first."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Request, ...]:
        """Requests with a place, first served first."""
        return tuple(self._running)

    def add(self, request: Request) -> None:
        """Take in a request; ids grow, so that the older of two has the smaller one."""
        bisect.insort(self._waiting, request, key=_order)

    def remove(self, request: Request, *, valid: bool = True) -> None:
        """End a request wherever it is; its place is free at once. More than once does nothing.

        `valid=False` says that what its last row wrote is unknown.
        """
        if request.state is State.RUNNING:
            self._running.remove(request)
            self._cache.free(request.id, valid=valid)
        elif request.state is State.WAITING:
            self._waiting.remove(request)
        request.state = State.ENDED

    def schedule(self) -> Step | None:
        """The next step; None when there is nothing to do.

        A request that is waiting and fits never makes it None: see `KVCache.fits`.
        """
        rows = list(self._decode_rows())
        prefill = self._prefill_row()
        there = {request.id for request in self._running}  # some made room for others just now
        decode = tuple(row for row in rows if row.request in there)
        return Step(prefill, decode) if prefill or decode else None

    def update(self, step: Step, result: StepResult) -> None:
        """Note what a step did. Requests that ended meanwhile are passed over."""
        by_id = {request.id: request for request in self._running}
        failed = set(result.failed)
        for row in step.rows:
            request = by_id.get(row.request)
            if request is None:
                continue
            if row.request in failed:
                self.remove(request, valid=False)
                continue
            self._cache.note(request.id, request.keys[row.start : row.stop])
            request.computed = row.stop
            if row.request in result.tokens:
                token = result.tokens[row.request]
                if token is None:
                    self.remove(request)
                else:
                    request.append(token)

    def _decode_rows(self) -> Iterator[Row]:
        # The last served may lose its place to any before it, so the list can shrink on the way.
        for request in list(self._running):
            if request.state is not State.RUNNING or not request.decoding:
                continue
            while not self._cache.grow(request.id, len(request.tokens)):
                victim = self._running[-1]
                self._preempt(victim)
                if victim is request:
                    break
            if request.state is State.RUNNING:
                yield Row(request.id, request.computed, len(request.tokens), "last")

    def _prefill_row(self) -> Row | None:
        request = next((r for r in self._running if not r.decoding), None) or self._admit()
        if request is None:
            return None
        start = request.computed
        stop = min(start + self._chunk, len(request.tokens))
        while not self._cache.grow(request.id, stop):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return None
        every = request.fresh and start < request.prompt_length
        last = stop == len(request.tokens)
        return Row(request.id, start, stop, "all" if every else "last" if last else "none")

    def _admit(self) -> Request | None:
        """Give the next waiting request a place, if there is room or somebody must make it."""
        if not self._waiting:
            return None
        request = self._waiting[0]
        while (cached := self._begin(request)) is None:
            last = self._running[-1] if self._running else None
            if last is None or last.priority >= request.priority:
                return None
            self._preempt(last)
        self._waiting.remove(request)
        request.state, request.computed, request.cached = State.RUNNING, cached, cached
        bisect.insort(self._running, request, key=_order)
        return request

    def _begin(self, request: Request) -> int | None:
        if len(self._running) >= self._rows:
            return None
        return self._cache.begin(
            request.id, request.keys, salt=request.salt, reuse=not request.fresh
        )

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self._cache.free(request.id)
        request.state, request.computed = State.WAITING, 0
        request.preempted += 1
        bisect.insort(self._waiting, request, key=_order)


def _order(request: Request) -> tuple[int, int]:
    return -request.priority, request.id
