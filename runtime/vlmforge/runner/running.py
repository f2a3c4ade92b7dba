"""What is under way: jobs that have a place, and a step that has been begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlmforge.backends import FloatArray
from vlmforge.backends.choice import FIRST_TOKENS, BegunFirst, BegunPrompts, BegunTokens, Choice
from vlmforge.runner.decoder_input import DecoderInput
from vlmforge.runner.job import Job
from vlmforge.runner.step import Row, Step, StepRecord
from vlmforge.vl.prepared import PreparedImage


@dataclass(slots=True, eq=False)
class Active:
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
    here: bool = False  # its next token is chosen here, as it turned out
    prompt_logits: list[FloatArray] = field(default_factory=list)

    @property
    def input(self) -> DecoderInput:
        """What its prompt is to the decoder; there once its images are encoded."""
        assert self.given is not None
        return self.given


Lost = tuple[Sequence[Row], BaseException]
"""Rows that cannot be run, and why."""
Choices = Mapping[int, Choice | None]
"""How the tokens of sequences are to be chosen, where that is not done here."""


@dataclass(slots=True, eq=False)
class Running:
    """A step that has been begun, and is to be finished.

    Attributes:
        step: What was planned.
        begun: When (`time.perf_counter`).
        lost: Rows that ended when it was begun, and why.
        prompts, rows: The others, those of prompts and those of tokens, in the device's order.
        first: Sequences among the prompts whose next token is chosen by the device.
        logits, found: What becomes of them, or why nothing does; None where there are none.
        images: That the vision part was run for.
        encode: Seconds that this took.
    """

    step: Step
    begun: float
    lost: Sequence[Lost]
    prompts: Sequence[Row]
    rows: Sequence[Row]
    first: frozenset[int]
    logits: BegunPrompts | BegunFirst | BaseException | None
    found: BegunTokens | BaseException | None
    images: int
    encode: float

    def record(self) -> StepRecord:
        """What it did; seconds are the device's."""
        prompt, decode = (
            0.0 if one is None or isinstance(one, BaseException) else one.seconds
            for one in (self.logits, self.found)
        )
        return StepRecord(self.step, self.begun, self.images, self.encode, prompt, decode)

    @property
    def places(self) -> Mapping[int, int]:
        """Where the next tokens will be that the device chooses, by sequence, as `begin` says."""
        first = {
            row.sequence: FIRST_TOKENS + place
            for place, row in enumerate(self.prompts)
            if row.sequence in self.first
        }
        return first | {row.sequence: place for place, row in enumerate(self.rows)}

    @property
    def failed(self) -> bool:
        """Whether it, or some of its rows, could not be begun."""
        return bool(self.lost) or any(
            isinstance(one, BaseException) for one in (self.logits, self.found)
        )
