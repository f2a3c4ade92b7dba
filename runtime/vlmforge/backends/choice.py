"""How a step's tokens are to be chosen where the logits are: plain numbers, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlmforge.backends import DecoderBatch, FloatArray


@dataclass(frozen=True, slots=True)
class Edits:
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


@dataclass(frozen=True, slots=True)
class Choice:
    """How the next token of one sequence is chosen; see `SamplingParams`.

    Attributes:
        numbers: Temperature, top-k (the size of the vocabulary keeps all), top-p, min-p, and the
            random number in [0, 1) that decides; below 0 for the likeliest token.
        edits: What is changed before.
        logprobs: Likeliest tokens to be told of.
    """

    numbers: tuple[float, float, float, float, float]
    edits: Edits = NO_EDITS
    logprobs: int = 0


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
