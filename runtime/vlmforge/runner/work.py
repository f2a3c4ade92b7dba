"""One step: arrays for the decoder, features for the images, logits to whoever chooses."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from msgspec import Struct, field, structs

from vlmforge.backends import FloatArray, IntArray
from vlmforge.backends.choice import GREEDY, BegunFirst, BegunPrompts, BegunTokens, Choice, Found
from vlmforge.errors import EngineStepError, as_ours
from vlmforge.kv.cache import Copy
from vlmforge.outputs.token_chooser import PrefillFacts
from vlmforge.runner.decoder_input import DecoderInput, PromptPart, together
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.job import Job
from vlmforge.runner.running import Active, Choices, Lost, Mixed, Running, Share
from vlmforge.runner.stages import Engine
from vlmforge.runner.step import AHEAD, Row, Step
from vlmforge.vl.prepared import PreparedImage

logger = logging.getLogger("vlmforge")
T = TypeVar("T")


class Work(Struct):
    """One step."""

    engine: Engine
    cache: FeatureCache
    active: dict[int, Active]
    tokens: dict[int, int | None] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    again: set[int] = field(default_factory=set)
    images: int = 0
    encode: float = 0.0

    def move(self, step: Step) -> Sequence[Lost]:
        """What the cache asks for; whom it fails."""
        wrong = dict[int, BaseException]()  # by place
        for move in step.moves:
            try:
                self.engine.decoder.move(move)
            except BaseException as error:
                if isinstance(move, Copy):
                    wrong[move.target] = error
                else:  # memory that did not go back; its content is of no use anyway
                    logger.warning("the cache's memory could not be given back", exc_info=True)
            else:
                if isinstance(move, Copy):
                    wrong.pop(move.target, None)
                    if move.source in wrong:  # a copy of what is not there
                        wrong[move.target] = wrong[move.source]
        rows = step.rows if wrong else ()
        return [([row for row in rows if at in row.place], why) for at, why in wrong.items()]

    def prefill(self, rows: Sequence[Row], ahead: Iterable[PreparedImage]) -> None:
        """Run parts of prompts; where they end, choose the first tokens."""
        if not rows:
            return
        ahead = self.images_of(rows, ahead)
        # Apart, none waits for the images of those behind it.
        for some in [[row] for row in rows] if self.engine.options.apart else [rows]:
            ready = [row for row in some if self._ready(row, ahead)]
            logits = self.attempt(ready, partial(self._run_prompts, ready)) if ready else None
            for row, found in zip(ready, logits or (), strict=logits is not None):
                self.prompted(row, found)

    def _ready(self, row: Row, ahead: Sequence[PreparedImage]) -> bool:
        """Whether a part of a prompt can be run: its images are encoded."""
        active = self.active[row.sequence]
        return row.sequence not in self.failed and bool(
            self.attempt([row], partial(self._encode, active, row, ahead))
        )

    def prompted(self, row: Row, found: Found | None) -> None:
        """A part of a prompt has been run, and gave logits `[n, vocab_size]` or the next token.

        None: it could not be chosen there, and the logits are gone; the part is run again.
        """
        active = self.active[row.sequence]
        if found is None and row.logits != "none":
            active.here = True
            self.again.add(row.sequence)
            return
        logits = found if isinstance(found, np.ndarray) else None
        if row.logits == "all" and logits is not None:
            active.prompt_logits = active.prompt_logits if row.start else []
            active.prompt_logits.append(logits)
        if row.logits == "none" or not self._ends_prompt(active, row):
            return
        active.prompted()
        last = found if logits is None else logits[-1]
        assert last is not None
        if active.begun:
            self._accept(row.sequence, last)
            return
        facts = self._facts(active)
        for sequence in (row.sequence, *self._part(row, active)):
            if self._begin(sequence, facts):
                self._accept(sequence, last)

    def _part(self, row: Row, active: Active) -> tuple[int, ...]:
        """Other answers to the prompt become jobs of their own; returns their sequences."""
        jobs, active.job.siblings = active.job.siblings, ()
        for fork, job in zip(row.forks, jobs, strict=True):
            self.active[fork] = structs.replace(
                active, job=job, images=list(active.images), features=list(active.features)
            )
        return row.forks

    def decode(self, rows: Sequence[Row]) -> None:
        """Run the tokens of sequences, and choose the next ones."""
        rows = [row for row in rows if row.sequence not in self.failed]
        choices = self._choices(rows)
        if choices is not None:
            rows = [row for row in rows if row.sequence in choices]
        if not rows:
            return
        found = self.attempt(rows, lambda: self._run_tokens(rows, choices))
        if found is None:
            return
        for row, values in zip(rows, found, strict=True):
            self._accept(row.sequence, values)

    def images_of(
        self, rows: Sequence[Row], ahead: Iterable[PreparedImage]
    ) -> Sequence[PreparedImage]:
        """What the rows of a step want of the vision part, if anything, and what is `ahead`."""
        held = [self.active[row.sequence] for row in rows if row.sequence in self.active]
        own = [image for active in held for image in active.wanted]
        return [*own, *ahead] if own else ()

    def _ends_prompt(self, active: Active, row: Row) -> bool:
        return row.logits == "last" or row.stop == len(active.job.prompt.token_ids)

    def _encode(self, active: Active, row: Row, ahead: Sequence[PreparedImage]) -> bool:
        """Have the features of all images whose tokens are not in the cache; True."""
        begun, spans = time.perf_counter(), active.job.prompt.image_spans
        wanted = {span.image for span in spans if span.start + span.length > row.start}
        needed = [index for index in sorted(wanted) if active.features[index] is None]
        images = [image for index in needed if (image := active.images[index]) is not None]
        found, known = self.cache.get(images, ahead) if images else ([], 0)
        for index, features in zip(needed, found, strict=True):
            active.encoded(index, features)
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
        check_logits(rows, found)
        return found

    def _chunk(self, row: Row) -> DecoderInput:
        given = self.active[row.sequence].input
        # Behind the prompt are tokens that were generated before the sequence lost its place.
        prompt = given.ids[row.start : row.stop]
        ids = np.concatenate((prompt, np.array(row.tokens[len(prompt) :], np.int64)))
        return structs.replace(given, ids=ids)

    def _choices(self, rows: Sequence[Row]) -> Mapping[int, Choice | None] | None:
        """How tokens are to be chosen, by sequence, where that is not done here."""
        if self.engine.choosing is None:
            return None
        jobs = {row.sequence: self.active[row.sequence].job for row in rows}
        if all(job.likeliest for job in jobs.values()):
            return None
        found: dict[int, Choice | None] = {}
        for row in rows:
            try:
                found[row.sequence] = jobs[row.sequence].generation.choice()
            except BaseException as error:  # noqa: BLE001 - ends this sequence, whatever it is
                self.lose([row], error)
        return found

    def encoded(self, row: Row, ahead: Sequence[PreparedImage]) -> BaseException | None:
        """Have the features for a part of a prompt; why they cannot be had."""
        try:
            self._encode(self.active[row.sequence], row, ahead)
        except BaseException as error:  # noqa: BLE001 - handed to the caller that it concerns
            return error
        return None

    def begin_prompts(
        self, rows: Sequence[Row], first: Mapping[int, Choice | None]
    ) -> BegunPrompts | BegunFirst:
        """Begin the parts of prompts; `first` are those whose next tokens the device chooses."""
        parts = [PromptPart(row.place, self._chunk(row), row.start) for row in rows]
        if not first:
            return self.engine.begin_prompts(parts, "none" if rows[0].logits == "none" else "last")
        given = [first.get(row.sequence) for row in rows]
        return self.engine.begin_first(parts, given if any(given) else None)

    def first(self, rows: Sequence[Row]) -> Mapping[int, Choice | None]:
        """How the tokens behind prompts are chosen, by sequence, where the device does that.

        All the likeliest, of which there is nothing to be said; or some as is said.
        """
        engine = self.engine
        if engine.overlapping is None or engine.first is None:
            return {}
        ends = {row.sequence: self.active[row.sequence].job for row in rows if row.logits == "last"}
        here = any(self.active[name].here for name in ends)
        asked = here or any(row.forks or row.logits == "all" for row in rows)
        if not asked and all(job.likeliest for job in ends.values()):
            able = engine.overlapping.can_begin(len(ends), None)
            return dict.fromkeys(ends) if able and ends else {}
        found = {}
        for row in rows:
            # One that could not be chosen there once is chosen here.
            if row.sequence in ends and not row.forks and not self.active[row.sequence].here:
                choice = _choice(ends[row.sequence])
                if choice is not None and engine.overlapping.can_begin(1, [choice]):
                    found[row.sequence] = choice
        return found

    def mixes(self, rows: Sequence[Row], first: Mapping[int, Choice | None]) -> bool:
        """Whether these prompts are run in one step with tokens of others: none wants logits."""
        packed = self.engine.options.packs and self.engine.overlapping is not None
        return packed and all(row.sequence in first or row.logits == "none" for row in rows)

    def begin_mixed(
        self,
        prompts: Sequence[Row],
        first: Mapping[int, Choice | None],
        rows: Sequence[Row],
        choices: Choices,
        before: Running | None,
    ) -> tuple[Share, Share]:
        """Begin parts of prompts and tokens (see `begin_tokens`) in one step; what is of each."""
        parts = [PromptPart(row.place, self._chunk(row), row.start) for row in (*prompts, *rows)]
        sources = np.concatenate((np.full(len(prompts), -1), self._sources(rows, before)))
        asked = [*(first.get(row.sequence) for row in prompts)]
        asked += [choices[row.sequence] for row in rows]
        given = [choice or GREEDY for choice in asked] if any(asked) else None
        decoder = self.engine.overlapping
        assert decoder is not None
        batch = together(parts, self.engine.manifest.decode)
        mixed, count = Mixed(decoder.begin(batch, given, sources)), len(prompts)
        return Share(mixed, slice(0, count)), Share(mixed, slice(count, None))

    def begin_tokens(
        self, rows: Sequence[Row], choices: Choices, before: Running | None
    ) -> BegunTokens:
        """Begin the rows, those that are `AHEAD` with the tokens of `before`."""
        found = [choice for row in rows if (choice := choices[row.sequence]) is not None]
        sources = self._sources(rows, before)
        where, tokens, lengths, levels, lags = self._inputs(rows)
        tokens = np.maximum(tokens, 0)
        return self.engine.begin(where, tokens, lengths, levels, lags, found or None, sources)

    def _sources(self, rows: Sequence[Row], before: Running | None) -> IntArray:
        """Where `before` has the tokens of the rows that are `AHEAD`."""
        places = {} if before is None else before.places
        ahead = [places[r.sequence] if r.tokens == (AHEAD,) else -1 for r in rows]
        return np.array(ahead, np.int64)

    def decided_here(self, sequence: int) -> None:
        """The device could not choose the token behind a prompt, and may go on with a wrong one."""
        self.active[sequence].here = True

    def take(self, sequence: int, found: Found | None) -> None:
        """What was found for a row of a step that was begun; None: it is to be run again."""
        active = self.active[sequence]
        if found is None or active.here:
            active.here = True
            self.again.add(sequence)
        else:
            self._accept(sequence, found)

    def _inputs(
        self, rows: Sequence[Row]
    ) -> tuple[Sequence[tuple[int, ...]], IntArray, IntArray, IntArray, IntArray]:
        """Of each row: its place, its token, the tokens before, the rotary level and the lag."""
        inputs = [(row, self.active[row.sequence].input) for row in rows]
        given = [(row.tokens[0], row.start, one.rotary_level, one.lag) for row, one in inputs]
        tokens, lengths, levels, lags = np.array(list(zip(*given, strict=True)), np.int64)
        return [row.place for row in rows], tokens, lengths, levels, lags

    def _run_tokens(
        self, rows: Sequence[Row], choices: Mapping[int, Choice | None] | None
    ) -> Sequence[Found]:
        likeliest = all(self.active[row.sequence].job.likeliest for row in rows)
        given = None if choices is None else [choices[row.sequence] for row in rows]
        found = self.engine.decode(*self._inputs(rows), likeliest=likeliest, choices=given)
        if len(found) != len(rows):
            raise ValueError(f"the decoder gave {len(found)} rows for {len(rows)} sequences")
        return found

    def _facts(self, active: Active) -> PrefillFacts:
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
        active = self.active[sequence]
        active.here = False
        try:
            token = active.job.generation.accept(found)
            self.tokens[sequence] = None if token is None else int(token)
        except BaseException as error:  # noqa: BLE001 - a logits processor may raise anything
            self._end(sequence, error)

    def attempt(self, rows: Sequence[Row], call: Callable[[], T]) -> T | None:
        """What `call` gives. If it raises, these rows fail; None then."""
        try:
            return call()
        except BaseException as error:  # noqa: BLE001 - handed to the callers that it concerns
            self.lose(rows, error)
            return None

    def lose(self, rows: Sequence[Row], error: BaseException) -> None:
        """Nobody knows what these sequences have in the cache: they end."""
        for row in rows:
            self.failed.add(row.sequence)
            self.active[row.sequence].job.fail(EngineStepError.of(error))

    def _end(self, sequence: int, error: BaseException) -> None:
        """The answer ends with an error; what is in the cache is whole."""
        self.tokens[sequence] = None
        self.active[sequence].job.fail(error)


def _choice(job: Job) -> Choice | None:
    try:
        return job.generation.choice()
    except BaseException:  # noqa: BLE001 - where it is chosen here, whom it concerns is told
        return None


def check_logits(rows: Sequence[Row], found: Sequence[object]) -> None:
    """Whether there are logits for the end of each prompt (ValueError)."""
    for row, given in zip(rows, found, strict=True):
        if isinstance(given, np.ndarray) and not len(given) and row.logits != "none":
            raise ValueError("the decoder gave no logits for the end of a prompt")
