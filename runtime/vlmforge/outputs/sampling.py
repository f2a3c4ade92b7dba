"""From the logits of one step to the next token.

The order: logits processors, repetition penalty, presence and frequency penalties, bad words,
minimum length, response format, temperature, top-k, softmax, top-p, min-p, renormalise, draw.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.backends.choice import NO_EDITS, Choice, Edits, Picked
from vlmforge.errors import ConfigError, EngineError
from vlmforge.outputs.drawing import draw, nucleus, weights_of
from vlmforge.outputs.grammar import Guide
from vlmforge.outputs.logprobs import Logits, top_ids, top_logprobs

LogitsProcessor: TypeAlias = Callable[[list[int], Logits], Logits]
"""`(ids so far, logits [vocab]) -> logits [vocab]`; ids of the prompt's text come first."""


class SamplingParams(Struct, frozen=True):
    """How one request chooses its tokens. The defaults: greedy, nothing edited.

    Attributes:
        greedy: Take the largest logit (the lowest id of equals); `temperature`, `top_k`, `top_p`
            and `min_p` play no part then.
        temperature: Divides the logits; > 0 unless greedy.
        top_k: Keep this many of the largest logits; 0 keeps all.
        top_p: Keep the smallest set of the likeliest tokens whose probability reaches this.
        min_p: Then drop those below `min_p` times the largest probability.
        repetition_penalty: Divides positive and multiplies negative logits of ids that occurred.
        presence_penalty: Taken from the logits of ids that were generated.
        frequency_penalty: Taken from them once for each time.
        seed: Of the random generator; None draws one from the system.
        choice: Which of the answers to a prompt: each draws from a stream of its own, which the
            seed and this number determine.
        logits_processors: Applied first, in order.
        bad_words: Id sequences that must not be generated, of one id or more.
        held_ids: Masked until `min_new_tokens` tokens were generated.
        min_new_tokens: See `held_ids`.
        logprobs: Report the log-probabilities of this many tokens; 0 reports none.
        guide: Tokens that do not lead to an answer of its form are masked.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    choice: int = 0
    logits_processors: tuple[LogitsProcessor, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    held_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    logprobs: int = 0
    guide: Guide | None = None

    @property
    def likeliest(self) -> bool:
        """Whether the id of the largest logit is all that it takes to choose."""
        return self.greedy and not self.logprobs and not self.edits

    @property
    def edits(self) -> bool:
        """Whether anything is done to the logits, of any step, before one is chosen."""
        edited = self.logits_processors or self.bad_words or self.guide
        held = self.held_ids and self.min_new_tokens
        penalty = self.presence_penalty or self.frequency_penalty
        return bool(self.repetition_penalty != 1 or penalty or edited or held)


class SampledToken(NamedTuple):
    """A chosen token. A tuple: there are many, and they are made fast.

    With `logprobs`, `logprob` is its log-probability and `top_logprobs` has the likeliest tokens,
    best first, always with the chosen one: log-softmax of the logits after processors, penalty
    and bans, before temperature and truncation. Banned tokens are left out.
    """

    id: int
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        params: How.
        vocab_size: Number of logits of a step.
        prompt_ids: Ids of the prompt's text. Image positions do not belong here: they have no
            token, so they are not penalised as repetition.
        rng: A generator to go on with (`Sampler.rng` of another one); None makes one from
            `params.seed`, unless nothing is drawn.

    Raises:
        ConfigError: an id outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt_ids: Sequence[int] = (),
        rng: np.random.Generator | None = None,
    ) -> None:
        _check_ids("the prompt", prompt_ids, vocab_size)
        _check_ids("bad words", [i for word in params.bad_words for i in word], vocab_size)
        _check_ids("stop tokens", params.held_ids, vocab_size)
        self.rng = _generator(params) if rng is None and not params.greedy else rng
        self._params, self._plain = params, not params.edits
        self._vocab_size = vocab_size
        self._prompt = tuple(prompt_ids)
        self._generated: list[int] = []
        self._bad_ids = [word[0] for word in params.bad_words if len(word) == 1]
        self._bad_sequences = [word for word in params.bad_words if len(word) > 1]
        self._matcher = None if params.guide is None else params.guide.matcher()
        self._seen = np.zeros(vocab_size, np.bool_)
        self._seen[list(self._prompt)] = True
        self._numbers: deque[float] = deque()  # drawn, and nothing chosen by them yet

    def choice(self, ahead: int = 0) -> Choice | None:
        """How the next token is to be chosen elsewhere, as `step` would; None: only by `step`.

        Whoever chooses it, `step` is to be called with it, or with the logits: that draws no other
        number. `ahead` tokens, one at most, come before it, with which `step` will be called first;
        None too where what they are decides how, in another way than `Choice.behind`.
        """
        params = self._params
        if params.logits_processors or params.guide or (ahead and self._counts):
            return None
        edits, behind = self._edits(ahead), self._behind if ahead else None
        if behind is not None and not len(edits.ids):  # nothing to fill up with that is not its own
            return None
        numbers = (1.0, float(self._vocab_size), 1.0, 0.0, -1.0)
        if self.rng is not None and not params.greedy:
            while len(self._numbers) <= ahead:
                self._numbers.append(float(self.rng.random()))
            kept = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
            number = self._numbers[ahead]
            numbers = (params.temperature, kept, params.top_p, params.min_p, number)
        return Choice(numbers, edits, params.logprobs, behind)

    @property
    def _counts(self) -> bool:
        """Whether a choice depends on more of the token before than that it is there."""
        params = self._params
        repeated = params.repetition_penalty != 1
        both = repeated and params.presence_penalty  # one that only the prompt has gets one of them
        return bool(params.frequency_penalty or both or self._bad_sequences)

    @property
    def _behind(self) -> tuple[float, float] | None:
        params = self._params
        edit = params.repetition_penalty, params.presence_penalty
        return None if edit == (1, 0) else edit

    def _next_number(self) -> float:
        assert self.rng is not None
        return self._numbers.popleft() if self._numbers else float(self.rng.random())

    def _edits(self, ahead: int) -> Edits:
        """What `_edited` does to the logits, where it is arithmetic."""
        params, banned = self._params, self._banned_now(ahead)
        repeated = params.repetition_penalty != 1
        counted = params.presence_penalty or params.frequency_penalty
        if not (banned or repeated or counted):
            return NO_EDITS
        generated, counts = np.unique(self._generated if counted else [], return_counts=True)
        seen = np.flatnonzero(self._seen) if repeated else np.zeros(0, np.int64)
        ids = np.unique(np.concatenate((seen, generated, banned))).astype(np.int64)
        factors = np.where(self._seen[ids] & repeated, params.repetition_penalty, 1)
        minus = np.zeros(len(ids))
        taken = params.presence_penalty + params.frequency_penalty * counts
        minus[np.searchsorted(ids, generated)] = taken
        minus[np.searchsorted(ids, banned)] = np.inf
        return Edits(ids, factors.astype(np.float32), minus)

    def step(self, logits: Logits | np.int64 | Picked) -> SampledToken:
        """Choose from logits `[vocab_size]`, which are left as they are.

        The id of the largest will do if the parameters are `likeliest`; -1: they are not finite. So
        does what was chosen by `choice`.

        Raises:
            EngineError: the logits are not finite, or the guide was lost.
            ConfigError: every token is banned, or a processor or the penalty broke the logits.
        """
        if isinstance(logits, Picked):
            return self._picked(logits)
        if isinstance(logits, np.int64):
            return self._known(int(logits))
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits of shape {logits.shape}, not ({self._vocab_size},)")
        token = int(logits.argmax())
        if not math.isfinite(peak := float(logits[token])):
            raise _not_finite(peak)
        edited = logits if self._plain else self._edited(logits)
        if not self._plain:
            token = int(edited.argmax())
            _check_edited(float(edited[token]))
        if self.rng is not None and not self._params.greedy:
            token = draw(*_weights(edited, self._params), self._next_number())
        if self._matcher is not None:
            self._matcher.accept(token)
        self._generated.append(token)
        self._seen[token] = True
        if not self._params.logprobs:
            return SampledToken(token)
        top = top_logprobs(edited, self._params.logprobs, token)
        return SampledToken(token, top[token], top)

    def _picked(self, picked: Picked) -> SampledToken:
        if self._numbers:
            self._numbers.popleft()
        token = self._known(picked.id)
        if not self._params.logprobs:
            return token
        return SampledToken(
            token.id, picked.logprob, {**picked.likeliest, token.id: picked.logprob}
        )

    def _known(self, token: int) -> SampledToken:
        if token < 0:
            raise _not_finite(math.nan)
        self._generated.append(token)
        self._seen[token] = True
        return SampledToken(token)

    def _edited(self, logits: Logits) -> Logits:
        """A copy, edited as `params.edits` says."""
        params = self._params
        banned = self._banned_now()
        penalty = params.presence_penalty or params.frequency_penalty
        logits = np.array(logits, np.float32)
        for processor in params.logits_processors:
            logits = self._processed(processor, logits)
        if params.repetition_penalty != 1:
            _penalise(logits, self._seen, params.repetition_penalty)
        if penalty and self._generated:
            ids, counts = np.unique(self._generated, return_counts=True)
            logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
        logits[banned] = -np.inf
        if self._matcher is not None:
            logits[~self._matcher.allowed()] = -np.inf
        return logits

    def _processed(self, processor: LogitsProcessor, logits: Logits) -> Logits:
        result: object = processor([*self._prompt, *self._generated], logits)
        if not isinstance(result, np.ndarray) or result.shape != (self._vocab_size,):
            raise ConfigError(
                "A logits processor did not return logits.",
                found=f"{type(result).__name__} of shape {getattr(result, 'shape', None)}",
                expected=f"a numpy array of shape ({self._vocab_size},)",
                fix="end the processor with `return logits`",
            )
        return np.array(result, np.float32)  # a copy: the processor may have kept its result

    def _banned_now(self, ahead: int = 0) -> list[int]:
        params, done = self._params, self._generated
        banned = list(self._bad_ids)
        banned += [word[-1] for word in self._bad_sequences if _ends_with(done, word[:-1])]
        if len(done) + ahead < params.min_new_tokens:
            banned += params.held_ids
        return banned


def _generator(params: SamplingParams) -> np.random.Generator:
    """For choice 0 that of the seed alone: it does not depend on how many there are."""
    key = (params.choice,) if params.choice else ()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(params.seed, spawn_key=key)))


def distribution(
    logits: Logits, params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids that may be drawn and their probabilities, which sum to 1.

    Temperature, top-k, softmax, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).

    Args:
        logits: `[vocab]`, the largest finite; -inf is never drawn.
        params: Not greedy.
    """
    ids, weights = _weights(logits, params)
    kept = np.flatnonzero(weights)
    probs = weights[kept]
    return kept if ids is None else ids[kept], probs / probs.sum()


def _weights(
    logits: Logits, params: SamplingParams
) -> tuple[NDArray[np.int64] | None, NDArray[np.float64]]:
    """As `distribution`, but not normalised, and some may be 0. None: all ids, in order."""
    ids = top_ids(logits, params.top_k) if 0 < params.top_k < len(logits) else None
    kept = logits if ids is None else logits[ids]
    if params.top_p < 1:
        places, weights = nucleus(kept, params.temperature, params.top_p)
        ids = places if ids is None else ids[places]
    else:
        weights = weights_of(kept, params.temperature, kept.max())
    if params.min_p > 0:
        places = np.flatnonzero(weights >= params.min_p)  # the largest is 1
        ids, weights = places if ids is None else ids[places], weights[places]
    return ids, weights


def _penalise(logits: Logits, seen: NDArray[np.bool_], penalty: float) -> None:
    """Keskar et al. 2019, once for each distinct id."""
    ids = np.flatnonzero(seen)
    values = logits[ids]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        logits[ids] = np.where(values < 0, values * penalty, values / penalty)


def _ends_with(ids: list[int], end: tuple[int, ...]) -> bool:
    return tuple(ids[-len(end) :]) == end


def _check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        outside = [i for i in ids if not 0 <= i < vocab_size]
        raise ConfigError(
            f"An id of {what} is outside the vocabulary.",
            found=str(outside[0]),
            expected=f"ids in [0, {vocab_size - 1}]",
            fix="take the ids from the tokenizer of this engine",
        )


def _not_finite(peak: float) -> EngineError:
    return EngineError(
        "The decoder gave logits that are not finite.",
        found=str(peak),
        expected="finite logits",
        fix="check the engine: vlmforge verify ENGINE; if it fails, build it again, with "
        "--dtype float32 if it was built with less",
    )


def _check_edited(peak: float) -> None:
    if peak == -math.inf:
        raise ConfigError(
            "Every token is banned, so none can be generated.",
            found="bad_words, bad_token_ids, min_new_tokens, logits_processors or response_format "
            "leave none",
            expected="at least one token that is allowed",
            fix="ban fewer tokens",
        )
    if not math.isfinite(peak):
        raise ConfigError(
            "The logits are not finite after repetition_penalty and logits_processors.",
            found=str(peak),
            expected="finite logits, or -inf for a token that must not be generated",
            fix="choose a repetition_penalty nearer to 1, or mend the logits processor",
        )
