"""Which tokens run next. No threads, no arrays of numbers, no devices: state in, `Step` out.

Continuous batching: while sequences decode, the prompt of one more is run in chunks beside them,
and those of others with it, as far as a chunk has room.
Higher priorities go first; within one, first come, first served. When the cache is full, whoever
would be served last gives up its place and is computed again later, generated tokens included.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from vlmforge.kv.cache import KVCache, common_prefix
from vlmforge.runner.step import AHEAD, Logits, Row, Step, StepResult
from vlmforge.scheduler.sequence import SequenceError, State, TokenSequence, failing, order
from vlmforge.scheduler.together import Together

_ALL = 512  # tokens whose logits are wanted, at once: they take more memory than all else


class Scheduler:
    """Plans steps of at most `rows` sequences; prompts run `chunk` tokens at a time.

    Or several of them, as is said by `together`.
    """

    def __init__(
        self, cache: KVCache, *, rows: int, chunk: int, together: Together | None = None
    ) -> None:
        self._cache, self._rows = cache, rows
        self._beside, self._decoding = together or Together(chunk), 0  # rows of the step at hand
        self._waiting: list[TokenSequence] = []  # in the order in which they will be served
        self._running: list[TokenSequence] = []  # likewise
        self._planned: list[Step] = []  # by `ahead`, and not run yet
        self._ahead: Counter[int] = Counter()  # rows of sequences in these
        self._reached: Mapping[int, int] = {}  # tokens that will be computed, of prompts under way
        self._leaving: dict[int, bool] = {}  # ended with such a row under way; valid?

    @property
    def waiting(self) -> tuple[TokenSequence, ...]:
        """Sequences without a place, next first."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[TokenSequence, ...]:
        """Sequences with a place, first served first."""
        return tuple(self._running)

    def add(self, sequence: TokenSequence) -> None:
        """Take in a sequence; ids grow, so that the older of two has the smaller one."""
        bisect.insort(self._waiting, sequence, key=order)

    def remove(self, sequence: TokenSequence, *, valid: bool = True) -> None:
        """End a sequence wherever it is. More than once does nothing.

        Its place is free at once, or as soon as the step that was planned `ahead` with a row of it
        has been run. `valid=False` says that what its last row wrote is unknown.
        """
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            if self._ahead[sequence.id]:
                self._leaving[sequence.id] = valid
            else:
                self._cache.free(sequence.id, valid=valid)
        elif sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        sequence.state = State.ENDED
        for fork in sequence.forks:  # that have not parted from it
            fork.state = State.ENDED

    def schedule(self) -> Step | None:
        """The next step; None when there is nothing to do.

        A sequence that is waiting and fits never makes it None: see `KVCache.fits`.

        Raises:
            SequenceError: remove that one, and ask again.
        """
        self._place_forks()
        decoding = list(self._grown())
        self._decoding = len(decoding)
        prefill = self._prefill_row()
        together = () if prefill is None else self._together(prefill)
        # Some made room for a prompt just now, and one may have come back as the prompt.
        there = [s for s in decoding if s.state is State.RUNNING and s.decoding]
        if prefill is not None:
            prompts = {row.sequence for row in (prefill, *together)}
            there = [s for s in there if s.id not in prompts]
        if prefill is None and not there:
            return None
        rows = tuple([self._token_row(s) for s in there])
        return Step(self._cache.take_moves(), prefill, rows, together)

    def behind(self, step: Step) -> Iterator[int]:
        """Sequences that may have a token run behind `step`, those whose prompt it ends too."""
        under_way = {row.sequence: row for row in step.rows}
        for sequence in self._running:
            row = under_way.get(sequence.id)
            if sequence.decoding if row is None else row.stop >= len(sequence.tokens):
                yield sequence.id

    def ahead(self, step: Step, able: Collection[int]) -> Step | None:
        """What follows `step`, which still runs, as far as it does not depend on how that ends.

        Prompts go on, and one token more of the `able`: those of `step` that may go on, tokens and
        ends of prompts, and all others that decode. None: somebody must give up a place, or needs
        what is not known yet.
        Until what is returned has been run too, only `ahead` plans more, and `update` is told of
        both in turn.

        Raises:
            SequenceError: remove that one when `step` has ended.
        """
        if self._waiting and self._must_wait(self._waiting[0]):
            return None
        self._reached = {row.sequence: row.stop for row in step.prompts}
        ends = (row for row in step.prompts if row.sequence in able)
        try:
            decode = self._decode_behind({row.sequence: row for row in (*step.decode, *ends)}, able)
            self._decoding = len(decode or ())
            prompts = None if decode is None else self._prompts_behind()
        finally:
            self._reached = {}
        if decode is None or prompts is None or not (decode or prompts):
            return None
        first = prompts[0] if prompts else None
        planned = Step(self._cache.take_moves(), first, tuple(decode), prompts[1:])
        self._planned.append(planned)
        self._ahead.update(row.sequence for row in planned.rows)
        return planned

    def _must_wait(self, first: TokenSequence) -> bool:
        """Whether who is next takes another's place, or parts from one that runs."""
        if self._running and self._running[-1].priority < first.priority:
            return True
        fork = first.parent is not None and not first.preempted
        return fork and len(self._running) < self._rows

    def _decode_behind(
        self, under_way: Mapping[int, Row], able: Collection[int]
    ) -> Sequence[Row] | None:
        """The next tokens; None: there is no room for all of them."""
        rows = []
        for sequence in self._running:
            before = under_way.get(sequence.id)
            if before is not None:
                start, token = before.stop, AHEAD
            elif sequence.decoding and sequence.id not in self._reached:
                start, token = sequence.computed, sequence.tokens[-1]
            else:
                continue
            if sequence.id not in able:
                if before is None:
                    return None
                continue
            try:
                if not self._cache.grow(sequence.id, start + 1):
                    return None
                place = self._cache.place(sequence.id)
            except BaseException as error:
                raise SequenceError(sequence) from error
            rows.append(Row(sequence.id, (token,), start, place, "last"))
        return rows

    def _prompts_behind(self) -> tuple[Row, ...] | None:
        """The next part of a prompt, and others; None: there is no room for it."""
        sequence = self._next_prompt()
        if sequence is None:
            return ()
        start, stop = self._next_part(sequence)
        if sequence.wants_all:
            return None
        with failing(sequence):
            if not self._cache.grow(sequence.id, stop):
                return None
        first = self._row(sequence, start, stop)
        return (first, *self._together(first))

    def update(self, step: Step, result: StepResult) -> tuple[SequenceError, ...]:
        """Note what a step did; returns whose tokens could not be noted: they have ended.

        Sequences that ended meanwhile are passed over.
        """
        self._let_leave(step)
        running = {sequence.id: sequence for sequence in self._running}
        errors = []
        for name in result.failed & running.keys():
            self.remove(running.pop(name), valid=False)
        for row in step.rows:
            name = row.sequence
            sequence = running.get(name)
            if sequence is None or name in result.again:
                continue
            try:
                self._note(sequence, row, result)
            except SequenceError as error:
                errors.append(error)
                self.remove(error.sequence, valid=False)
            if sequence.state is State.RUNNING and name in result.tokens:
                token = result.tokens[name]
                if token is None:
                    self.remove(sequence)
                else:
                    sequence.append(token)
        return tuple(errors)

    def _let_leave(self, step: Step) -> None:
        """The places of who ended before its last row, one of `step`, are free now."""
        if not (self._planned or self._leaving):
            return
        if any(planned is step for planned in self._planned):
            self._planned = [planned for planned in self._planned if planned is not step]
            self._ahead.subtract(row.sequence for row in step.rows)
            self._ahead += Counter()  # no zeros
        for name in [name for name in self._leaving if not self._ahead[name]]:
            self._cache.free(name, valid=self._leaving.pop(name))

    def _note(self, sequence: TokenSequence, row: Row, result: StepResult) -> None:
        stop = row.stop
        try:
            self._cache.note(sequence.id, sequence.keys[row.start : stop])
        except BaseException as error:
            raise SequenceError(sequence) from error
        sequence.computed = stop
        if not row.forks:
            return
        forks, sequence.forks = sequence.forks, []
        for fork in forks:
            token = result.tokens.get(fork.id)
            if token is None:
                fork.state = State.ENDED
            elif fork.state is State.HELD:
                fork.append(token)
                fork.state = State.WAITING
                self.add(fork)
        self._place_forks()  # now: the parent may have ended with its first token

    def _place_forks(self) -> None:
        """Give places to the forks that are next, as long as there are any to be had."""
        while self._waiting and len(self._running) < self._rows:
            fork = self._waiting[0]
            parent, prompt = fork.parent, fork.prompt_length
            there = parent is not None and parent.state is State.RUNNING
            if parent is None or not there or parent.computed < prompt or fork.preempted:
                return
            if self._ahead[parent.id]:  # it writes to what they would share
                return
            with failing(fork):
                if not self._cache.fork(parent.id, fork.id, fork.keys[:prompt]):
                    return
            self._run(fork, prompt)

    def _run(self, sequence: TokenSequence, cached: int) -> None:
        self._waiting.remove(sequence)
        sequence.state, sequence.computed, sequence.cached = State.RUNNING, cached, cached
        bisect.insort(self._running, sequence, key=order)

    def _grown(self) -> Iterator[TokenSequence]:
        """The sequences that decode, with room for one token more."""
        # Who comes last may lose its place to any before it, so the list shrinks on the way.
        for sequence in list(self._running):
            there = sequence.state is State.RUNNING and sequence.decoding
            if there and self._make_room(sequence, len(sequence.tokens)):
                yield sequence

    def _prefill_row(self) -> Row | None:
        sequence = self._next_prompt()
        if sequence is None:
            return None
        start, stop = self._next_part(sequence)
        if not self._make_room(sequence, stop):
            return None
        return self._row(sequence, start, stop)

    def _next_prompt(self) -> TokenSequence | None:
        begun = self._running if self._decoding < len(self._running) else ()  # mostly all decode
        return next(filter(self._prompting, begun), None) or self._admit()

    def _prompting(self, sequence: TokenSequence) -> bool:
        """Whether more than its newest token is left to run, behind what is under way."""
        return not sequence.decoding and self._start(sequence) < len(sequence.tokens)

    def _start(self, sequence: TokenSequence) -> int:
        return self._reached.get(sequence.id, sequence.computed)

    def _next_part(self, sequence: TokenSequence) -> tuple[int, int]:
        """Where the next part of a prompt begins and ends."""
        start, chunk = self._start(sequence), self._beside.tokens(self._decoding)
        most = min(chunk, _ALL) if sequence.wants_all else chunk
        return start, min(start + most, len(sequence.tokens))

    def _together(self, first: Row) -> tuple[Row, ...]:
        """What is left of other prompts and fits beside; nobody loses a place for them."""
        rows = [first]
        while first.logits != "all" and (row := self._another(rows)) is not None:
            rows.append(row)
        return tuple(rows[1:])

    def _another(self, rows: list[Row]) -> Row | None:
        there, room = {row.sequence for row in rows}, self._beside.room(rows, self._decoding)
        if not room:
            return None
        begun = (s for s in self._running if self._prompting(s) and s.id not in there)
        sequence = next(begun, None) or self._admit_beside(there, room)
        if sequence is None or sequence.wants_all:
            return None
        start = self._start(sequence)
        stop = start + self._beside.part(len(sequence.tokens) - start, room)
        with failing(sequence):
            fits = stop > start and self._beside.fits(rows, start, stop)
            if not fits or not self._cache.grow(sequence.id, stop):
                return None
        return self._row(sequence, start, stop)

    def _admit_beside(self, running: set[int], room: int) -> TokenSequence | None:
        """Give the next waiting sequence a place, if something of it is run in `room` tokens.

        One that begins as one that is `running` now finds this in the cache a step later, if kept.
        """
        sequence = self._waiting[0] if self._waiting else None
        if sequence is None or sequence.wants_all:
            return None
        known = self._cache.find(sequence.keys, salt=sequence.salt)[1]
        left = max(1, len(sequence.tokens) - known)  # the last one is run in any case
        if not self._beside.part(left, room):
            return None
        others = (s for s in self._running if s.id in running and s.salt == sequence.salt)
        if self._cache.reuses and any(
            common_prefix(s.keys, sequence.keys) >= known + self._beside.alike for s in others
        ):
            return None
        cached = self._begin(sequence)
        if cached is None:
            return None
        self._run(sequence, cached)
        return sequence

    def _row(self, sequence: TokenSequence, start: int, stop: int) -> Row:
        with failing(sequence):
            place = self._cache.place(sequence.id)
        ends = stop == len(sequence.tokens)
        logits: Logits = "all" if sequence.wants_all else "last" if ends else "none"
        forks = tuple(fork.id for fork in sequence.forks) if ends else ()
        return Row(sequence.id, tuple(sequence.tokens[start:stop]), start, place, logits, forks)

    def _token_row(self, sequence: TokenSequence) -> Row:
        """The newest token of one that decodes."""
        try:
            place = self._cache.place(sequence.id)
        except BaseException as error:
            raise SequenceError(sequence) from error
        return Row(sequence.id, (sequence.tokens[-1],), sequence.computed, place, "last")

    def _make_room(self, sequence: TokenSequence, tokens: int) -> bool:
        """Room for `tokens` tokens, if need be of those served later; False: it lost its own."""
        try:
            while not self._cache.grow(sequence.id, tokens):
                last = self._running[-1]
                self._preempt(last)
                if last is sequence:
                    return False
        except BaseException as error:
            raise SequenceError(sequence) from error
        return True

    def _admit(self) -> TokenSequence | None:
        """Give the next waiting sequence a place, if there is room or somebody must make it."""
        if not self._waiting:
            return None
        sequence = self._waiting[0]
        while (cached := self._begin(sequence)) is None:
            last = self._running[-1] if self._running else None
            if last is None or last.priority >= sequence.priority:
                return None
            self._preempt(last)
        self._run(sequence, cached)
        return sequence

    def _begin(self, sequence: TokenSequence) -> int | None:
        taken = len(self._running)
        if taken < self._rows:
            # By who came first, too, and is to part from one that runs: without a place it would
            # run the prompt.
            taken += sum([order(f) < order(sequence) for s in self._running for f in s.forks])
        if taken >= self._rows:
            return None
        with failing(sequence):
            return self._cache.begin(
                sequence.id, sequence.keys, salt=sequence.salt, reuse=not sequence.fresh
            )

    def _preempt(self, sequence: TokenSequence) -> None:
        self._running.remove(sequence)
        self._cache.free(sequence.id)
        sequence.state, sequence.computed = State.WAITING, 0
        sequence.preempted += 1
        bisect.insort(self._waiting, sequence, key=order)
