"""What a request gives back: its text and ids, and where its time went."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmforge.vl.boxes import Box

FinishReason: TypeAlias = Literal["stop", "length", "error", "abort"]
Stage: TypeAlias = Literal[
    "queue", "load", "image_wait", "preprocess", "encode", "prefill", "decode", "other"
]
_STAGES: tuple[Stage, ...] = (
    "queue",
    "load",
    "image_wait",
    "preprocess",
    "encode",
    "prefill",
    "decode",
    "other",
)


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the wall time of a request went, in seconds. The stages do not overlap.

    Attributes:
        queue: Waiting for a free slot.
        load: Fetching and decoding images.
        image_wait: Waiting for an image that another request is preparing.
        preprocess: Pixel values, template, tokenizer.
        encode: The vision part. Where its features stay on a GPU, nobody waits for it: the time to
            enqueue it, and the GPU's is in `prefill`.
        prefill: The prompt through the decoder, other sequences' turns included.
        decode: Generating, other sequences' turns included.
        other: The rest.
        cached_prefix_tokens: Prompt tokens that did not need prefill.
        cached_images: Images that did not need encoding.
        host_share: The part of the engine's steps, from the request to its end, that was not spent
            inside the engine's parts: sampling, text, bookkeeping. 0 to 1; 0 where none was seen.
    """

    queue: float = 0.0
    load: float = 0.0
    image_wait: float = 0.0
    preprocess: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    other: float = 0.0
    cached_prefix_tokens: int = 0
    cached_images: int = 0
    host_share: float = 0.0

    @property
    def total(self) -> float:
        """Wall time: the sum of the stages."""
        return math.fsum(getattr(self, stage) for stage in _STAGES)

    def __str__(self) -> str:
        stages = [f"{stage} {getattr(self, stage):.3f}" for stage in _STAGES]
        return f"{self.total:.3f} s = " + " + ".join(stages)


class Stopwatch:
    """Charges every moment since it was made to exactly one stage, first to "other".

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._mark = clock()
        self._current: Stage = "other"
        self._seconds: dict[Stage, float] = dict.fromkeys(_STAGES, 0.0)

    def copy(self) -> Stopwatch:
        """Another one that has measured the same so far, and goes on by itself."""
        other = copy.copy(self)
        other._seconds = dict(self._seconds)
        return other

    def switch(self, stage: Stage) -> Stage:
        """From now on, time is charged to `stage`; returns to which it was until now."""
        before, now = self._current, self._clock()
        self._seconds[before] += now - self._mark
        self._current, self._mark = stage, now
        return before

    def stage(self, stage: Stage) -> _Charged:
        """For a `with` whose time is charged to `stage`; inside another one, not to that one's."""
        return _Charged(self, stage)

    def split(self, parts: Mapping[Stage, float]) -> None:
        """Charge the time since the last call: `parts`, measured elsewhere, and the rest."""
        now = self._clock()
        for stage, seconds in parts.items():
            self._seconds[stage] += seconds
        self._seconds[self._current] += max(0.0, now - self._mark - math.fsum(parts.values()))
        self._mark = now

    def timings(self, *, cached_prefix_tokens: int = 0, cached_images: int = 0) -> Timings:
        """The ledger up to now; its `total` is the wall time since the watch was made."""
        self.split({})
        seconds = self._seconds
        return Timings(
            queue=seconds["queue"],
            load=seconds["load"],
            image_wait=seconds["image_wait"],
            preprocess=seconds["preprocess"],
            encode=seconds["encode"],
            prefill=seconds["prefill"],
            decode=seconds["decode"],
            other=seconds["other"],
            cached_prefix_tokens=cached_prefix_tokens,
            cached_images=cached_images,
        )


class _Charged:
    """No generator: there are several of every request."""

    __slots__ = ("_outer", "_stage", "_watch")

    def __init__(self, watch: Stopwatch, stage: Stage) -> None:
        self._watch, self._stage, self._outer = watch, stage, stage

    def __enter__(self) -> None:
        self._outer = self._watch.switch(self._stage)

    def __exit__(self, *_: object) -> None:
        self._watch.switch(self._outer)


@dataclass(slots=True, repr=False)
class Response:
    """The answer to a prompt, or a piece of it while streaming.

    Attributes:
        text: The text; in a stream the new text only.
        generate_token_len: Tokens generated so far.
        input_token_len: Tokens of the prompt, template and image tokens included.
        session_id: Of the session, or the place of the prompt in a list.
        finish_reason: "stop" (end token, stop word or repetition), "length" (max_new_tokens or
            the window), "error", "abort"; None while it goes on.
        token_ids: Ids of the text; in a stream the new ones only.
        logprobs: For each token, log-probabilities by id, if they were asked for.
        logits: float32 `[tokens, vocab]`, if they were asked for: what each token of the answer was
            chosen by; with "all", in front of them those after each earlier token of the prompt.
            Not compared, nor is `timings`.
        index: Place of the prompt in a list.
        error_code: Short name of the error.
        error_message: What went wrong and what to do.
        timings: Where the time went; in a stream on the last piece.
        cached_tokens: Prompt tokens that did not need prefill.
        ppl: Mean cross-entropy of the prompt's text, in nats a token, if it was asked for.
        choice: Which of the `n` answers to the prompt this is, from 0.
        others: The answers from 1 on, when `n` of them were asked for; see `choices`.
        boxes: What the text grounds in the latest image, for models that write boxes; the text
            keeps them too. In a stream, those of the whole text, on the last piece.
    """

    text: str = ""
    generate_token_len: int = 0
    input_token_len: int = 0
    session_id: int = 0
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    logits: NDArray[np.float32] | None = field(default=None, compare=False)
    index: int = 0
    error_code: str | None = None
    error_message: str | None = None
    timings: Timings | None = field(default=None, compare=False)
    cached_tokens: int = 0
    ppl: float | None = None
    boxes: tuple[Box, ...] = ()
    choice: int = 0
    others: tuple[Response, ...] = ()

    @property
    def choices(self) -> tuple[Response, ...]:
        """All `n` answers to the prompt, this one first."""
        return (self, *self.others)

    def extend(self, delta: Response) -> Response:
        """Append a piece of the stream to what came before it; returns `self`.

        A piece of another of the `n` answers goes to that one, in `others`. `session_id` and
        `index` say whose answer this is and stay as they are.
        """
        if delta.choice > self.choice:
            self._other(delta.choice).extend(delta)
            return self
        self.text += delta.text
        self.token_ids = self.token_ids + delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        if delta.logits is not None:
            rows = [delta.logits] if self.logits is None else [self.logits, delta.logits]
            self.logits = np.concatenate(rows)
        for name in ("generate_token_len", "input_token_len", "cached_tokens"):
            setattr(self, name, max(getattr(self, name), getattr(delta, name)))
        for name in ("finish_reason", "error_code", "error_message", "timings", "ppl"):
            if getattr(delta, name) is not None:
                setattr(self, name, getattr(delta, name))
        self.boxes = delta.boxes or self.boxes
        return self

    def _other(self, choice: int) -> Response:
        while len(self.others) < choice - self.choice:
            number = self.choice + len(self.others) + 1
            other = Response(session_id=self.session_id, index=self.index, choice=number)
            self.others = (*self.others, other)
        return self.others[choice - self.choice - 1]

    def __repr__(self) -> str:
        shown = [(name, getattr(self, name)) for name in _ALWAYS_SHOWN]
        for given in dataclasses.fields(self)[len(_ALWAYS_SHOWN) :]:
            value = getattr(self, given.name)
            if isinstance(value, np.ndarray) or value != given.default:
                shown.append((given.name, value))
        return f"Response({', '.join(f'{name}={_shown(value)}' for name, value in shown)})"


_ALWAYS_SHOWN = (
    "text",
    "generate_token_len",
    "input_token_len",
    "session_id",
    "finish_reason",
    "token_ids",
    "logprobs",
)


def _shown(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} {list(value.shape)}>"
    if isinstance(value, Timings):
        return f"<{value}>"
    return repr(value)
