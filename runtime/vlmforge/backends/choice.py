"""How a step's tokens are to be chosen where the logits are: plain numbers, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.backends import DecoderBatch, FloatArray, IntArray

T_co = TypeVar("T_co", covariant=True)


class Edits(Struct, frozen=True):
    """Logits that are changed before anything else, all of different ids.

    Attributes:
        ids: int64 `[n]`.
        factors: float32 `[n]`; positive logits are divided by them, others multiplied.
        minus: float64 `[n]`, taken from them then; infinity for what must not be chosen.
    """

    ids: NDArray[np.int64]
    factors: NDArray[np.float32]
    minus: NDArray[np.float64]


NO_EDITS = Edits(np.zeros(0, np.int64), np.ones(0, np.float32), np.zeros(0, np.float64))


class Choice(Struct, frozen=True):
    """How the next token of one sequence is chosen; see `SamplingParams`.

    Attributes:
        numbers: Temperature, top-k (the size of the vocabulary keeps all), top-p, min-p, and the
            random number in [0, 1) that decides; below 0 for the likeliest token.
        edits: What is changed before.
        logprobs: Likeliest tokens to be told of.
        behind: Factor and minus, as of `edits`, of the id of the token before, which nobody knows
            yet; it may be among `edits` with the same numbers. None: it changes nothing.
    """

    numbers: tuple[float, float, float, float, float]
    edits: Edits = NO_EDITS
    logprobs: int = 0
    behind: tuple[float, float] | None = None


GREEDY = Choice((1.0, 1.0, 1.0, 0.0, -1.0))
"""Of the likeliest token."""


class Picked(NamedTuple):
    """A token that was chosen where the logits are.

    Attributes:
        id: Of the token.
        logprob: Its log-probability, where some were asked for.
        likeliest: Log-probabilities by id, best first.
    """

    id: int
    logprob: float = 0.0
    likeliest: Mapping[int, float] = {}


Found = Picked | FloatArray | np.int64
"""What is known of a sequence's next token: itself, its logits, or the id of the largest."""


@runtime_checkable
class ChoosingDecoder(Protocol):
    """A `DecoderSession` that can choose tokens where it has the logits.

    Attributes:
        chooses: Whether this one can.
    """

    chooses: bool

    def choose(
        self, batch: DecoderBatch, choices: Sequence[Choice | None]
    ) -> Sequence[Picked | FloatArray]:
        """Run a step of decoding, and choose a token for each row.

        A row that has no choice gets its logits `[vocab_size]`, which are valid until the next
        step; so does one that cannot be chosen for. EngineError: the library failed.
        """


class Begun(Protocol[T_co]):
    """What a device runs, or has run.

    Attributes:
        seconds: That it took; known once it was waited for.
    """

    seconds: float

    def wait(self) -> T_co:
        """What was found. EngineError: the library failed."""


BegunTokens = Begun[Sequence[Picked | np.int64 | None]]
"""For each row what `ChoosingDecoder` or `LikeliestDecoder` gives; None: it must be chosen from the
logits, so the row is to be run again without being begun."""
BegunPrompts = Begun[Sequence[FloatArray]]
"""Of each row its logits as `DecoderSession.step` gives them, but valid for ever."""
BegunFirst = Begun[Sequence[Found]]
"""Of each row the token behind it, or its logits as `BegunPrompts` gives them."""
FIRST_TOKENS = 1 << 24
"""See `OverlappingDecoder.begin`."""


@runtime_checkable
class OverlappingDecoder(Protocol):
    """A `DecoderSession` that begins steps while those before run.

    Steps end in the order in which they were begun, and whatever else is asked comes behind them.
    """

    def can_begin(self, rows: int, choices: Sequence[Choice] | None) -> bool:
        """Whether `begin` can choose so for each of so many rows; of none: if it can at all."""

    def begin(
        self, batch: DecoderBatch, choices: Sequence[Choice] | None, ahead: IntArray
    ) -> BegunTokens:
        """Begin a step of decoding, to choose a token for each row; None: the likeliest.

        Rows of prompts may be among them where these are packed (`LoadOptions.packs`).
        `ahead` int64 `[B]` is the row of the last such step whose token is the row's input; from
        `FIRST_TOKENS` on the row, counted from there, of the prompts whose first tokens were begun
        last (`FirstTokenDecoder`); -1: it stands in `batch`. EngineError: the library failed.
        """

    def begin_prompts(self, batch: DecoderBatch) -> BegunPrompts:
        """Begin a step of prompts. EngineError: the library failed."""


@runtime_checkable
class FirstTokenDecoder(Protocol):
    """An `OverlappingDecoder` that chooses the tokens behind prompts as well."""

    def begin_first(
        self, batch: DecoderBatch, choices: Sequence[Choice | None] | None
    ) -> BegunFirst:
        """Begin a step of prompts, to choose the token behind each; None: the likeliest of all.

        A row that has no choice, or cannot be chosen for, gets its logits. EngineError: the library
        failed.
        """


def likeliest_ids(logits: FloatArray) -> IntArray:
    """Ids `[B]` of the largest of logits `[B, vocab_size]`; -1 where it is not finite."""
    ids: IntArray = logits.argmax(axis=1)
    ids[~np.isfinite(logits[np.arange(len(ids)), ids])] = -1
    return ids
