"""What is under way: jobs that have a place, and a step that has been begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct, field, structs

from vlmforge.backends import FloatArray
from vlmforge.backends.choice import (
    FIRST_TOKENS,
    BegunFirst,
    BegunPrompts,
    BegunTokens,
    Choice,
    Picked,
)
from vlmforge.backends.features import DeviceRows, Features
from vlmforge.runner.decoder_input import DecoderInput
from vlmforge.runner.job import Job
from vlmforge.runner.step import Row, Step, StepRecord
from vlmforge.vl.prepared import PreparedImage


class Active(Struct, eq=False):
    """A job that has a place, or has lost it for a while."""

    job: Job
    images: list[PreparedImage | None]  # let go once their features are here to stay
    features: list[Features | None]  # by image
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

    @property
    def wanted(self) -> list[PreparedImage]:
        """Images whose features are not here; not all of them need be."""
        pairs = zip(self.images, self.features, strict=True)
        return [image for image, rows in pairs if image is not None and rows is None]

    def encoded(self, index: int, features: Features) -> None:
        """The features of an image are here."""
        self.features[index] = features
        if not isinstance(features, DeviceRows):
            self.images[index] = None

    def prompted(self) -> None:
        """The prompt has been run: what lies on a device makes room for others' images.

        Should it have to be run again, they are encoded again.
        """
        if self.given is not None and isinstance(self.given.features, DeviceRows):
            self.given = structs.replace(self.given, features=None)
        held = enumerate(self.features)
        for index in [i for i, rows in held if isinstance(rows, DeviceRows)]:
            self.features[index] = None
            if (image := self.images[index]) is not None:
                self.images[index] = image.without_features()


Lost = tuple[Sequence[Row], BaseException]
"""Rows that cannot be run, and why."""
Choices = Mapping[int, Choice | None]
"""How the tokens of sequences are to be chosen, where that is not done here."""


class Running(Struct, eq=False):
    """A step that has been begun, and is to be finished.

    Attributes:
        step: What was planned.
        begun: When (`time.perf_counter`).
        lost: Rows that ended when it was begun, and why.
        prompts, rows: The others, those of prompts and those of tokens, in the device's order.
        first: Sequences among the prompts whose next token is chosen by the device.
        mixed: Whether both are one step of the device's, prompts first.
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
    mixed: bool
    logits: BegunPrompts | BegunFirst | BegunTokens | BaseException | None
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
        start, behind = (0, len(self.prompts)) if self.mixed else (FIRST_TOKENS, 0)
        first = {
            row.sequence: start + place
            for place, row in enumerate(self.prompts)
            if row.sequence in self.first
        }
        return first | {row.sequence: behind + place for place, row in enumerate(self.rows)}

    @property
    def failed(self) -> bool:
        """Whether it, or some of its rows, could not be begun."""
        return bool(self.lost) or any(
            isinstance(one, BaseException) for one in (self.logits, self.found)
        )


class Mixed(Struct, eq=False):
    """What is found for prompts and, behind them, for tokens of others, by one step."""

    begun: BegunTokens
    outcome: Sequence[Picked | np.int64 | None] | BaseException | None = None

    def wait(self) -> Sequence[Picked | np.int64 | None]:
        """Of all of them, once it is there; what was raised is raised for each who waits."""
        if self.outcome is None:
            try:
                self.outcome = self.begun.wait()
            except BaseException as error:  # noqa: BLE001 - see above
                self.outcome = error
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


class Share(Struct, eq=False):
    """Of the `rows` of a step that was `Mixed`; its seconds count for the prompts."""

    mixed: Mixed
    rows: slice
    seconds: float = 0.0

    def wait(self) -> Sequence[Picked | np.int64 | None]:
        """See `Mixed`."""
        found = self.mixed.wait()[self.rows]
        self.seconds = 0.0 if self.rows.start else self.mixed.begun.seconds
        return found
