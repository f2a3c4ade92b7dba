"""A pipeline over a stand-in for an engine's two parts: everything but the arithmetic is real.

The decoder's next token depends on all that is in the cache, so a sequence that is disturbed in any
way answers otherwise. What each part is called with is noted, and any call can be made to fail or
to wait.
"""

from __future__ import annotations

import io
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import pytest
from msgspec import structs

from conftest import wait_until
from sample_manifest import MANIFEST, PROMPT, TEMPLATE
from vlmforge import EngineConfig, GenerationConfig, Pipeline, VisionConfig
from vlmforge.api.load import serve
from vlmforge.backends import DecoderBatch, FloatArray, KeyValues, LoadOptions
from vlmforge.backends.choice import OverlappingDecoder
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays
from vlmforge.engine.manifest import Manifest
from vlmforge.inputs.render import marked_tokenizer_json
from vlmforge.inputs.template import jinja_from_parts
from vlmforge.inputs.template_choice import ActiveTemplate
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.kv.cache import Copy, Move
from vlmforge.outputs.response import Response
from vlmforge.runner.stages import Engine
from vlmforge.runner.step import Step
from vlmforge.scheduler.scheduler import Scheduler

T = TypeVar("T")
TOKENIZER = Path(__file__).parent / "data/llava_1_5_hf/checkpoint/tokenizer.json"
VOCAB, HIDDEN = MANIFEST.decode.vocab_size, MANIFEST.decode.hidden_size
TOKENS, CAPACITY = 4, 160
HANG_S = 600.0
"""Who has not answered by then never will: no test depends on how fast anything is."""


class Parts:
    """The vision part and the decoder part (`VisionSession`, `DecoderSession`).

    Attributes:
        calls: How often each function was called.
        rows: Sequences of each step of the decoder.
        before: Called with the function's name and its number, before anything is done.
    """

    def __init__(self, slots: int) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: list[int] = []
        self.before: Callable[[str, int], None] = lambda name, number: None
        self._cache = np.full((slots, CAPACITY), -7, np.int64)

    def encode(self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS) -> FloatArray:
        del arrays
        self._called("encode")
        views = [zlib.crc32(view.tobytes()) for view in pixel_values]
        marks = [[view % 9973 + 31 * row for row in range(TOKENS)] for view in views]
        return np.repeat(np.array(marks, np.float32)[..., None], HIDDEN, axis=2)

    def step(self, batch: DecoderBatch) -> FloatArray:
        self._called("step")
        self.rows.append(len(batch.input_ids))
        logits = np.zeros((*batch.logits_indices.shape, VOCAB), np.float32)
        for row, ids in enumerate(batch.input_ids):
            slot, past = self._cache[batch.slots[row]], int(batch.past_lengths[row])
            for place, token in enumerate(ids):
                slot[past + place] = self._content(int(token), batch.image_features)
            for k, place in enumerate(batch.logits_indices[row]):
                logits[row, k, 3 + zlib.crc32(slot[: past + place + 1].tobytes()) % 600] = 1
        return logits

    def move(self, move: Move) -> None:
        if isinstance(move, Copy):
            self._called("copy")
            self._cache[move.target, : move.tokens] = self._cache[move.source, : move.tokens]
        else:
            self._called("drop")
            self._cache[move.place, move.tokens :] = -7

    def read(self, place: Sequence[int], tokens: int) -> KeyValues:
        self._called("read")
        return {"key.0": self._cache[place[0], None, :tokens, None].copy()}

    def write(self, place: Sequence[int], rows: KeyValues, start: int) -> None:
        self._called("write")
        (given,) = rows.values()
        self._cache[place[0], start : given.shape[1]] = given[0, start:, 0]

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        self.before(name, self.calls[name])

    def _content(self, token: int, features: FloatArray | None) -> int:
        if token < VOCAB:
            return token
        assert features is not None
        return 10_000 + int(features[token - VOCAB, 0])


@cache
def _tokenizer() -> TextTokenizer:
    return TextTokenizer(marked_tokenizer_json(TOKENIZER.read_text("utf-8"), PROMPT))


def manifest(**prompt: Any) -> Manifest:
    """The sample manifest with other fields in its prompt policy."""
    return structs.replace(MANIFEST, prompt=structs.replace(PROMPT, **prompt))


def stand_in(
    parts: Parts | None = None,
    *,
    slots: int = 3,
    blocks: tuple[int, int] | None = None,
    of: Manifest = MANIFEST,
    vision: VisionConfig | None = None,
    **config: Any,
) -> Pipeline:
    """A pipeline with `slots` slots of `CAPACITY` tokens over the given parts.

    `blocks` is tokens of a block and their number; None: as many as fill the slots.
    """
    parts = Parts(slots) if parts is None else parts
    options = LoadOptions(slots=slots, capacity=CAPACITY, block_size=16)
    if not isinstance(parts, OverlappingDecoder):  # as on the processor
        options = structs.replace(options, prompts=slots, apart=True, packs=True)
    if blocks is not None:
        options = structs.replace(options, block_size=blocks[0], budget=blocks[1])
    template = jinja_from_parts(TEMPLATE, of.prompt.image_placeholder)
    engine = Engine(
        manifest=of,
        tokenizer=_tokenizer(),
        template=ActiveTemplate("plain", template, ()),
        vision=parts,
        decoder=parts,
        options=options,
    )
    return serve(engine, EngineConfig(**config), vision or VisionConfig())


def settle(pipe: Pipeline) -> None:
    """Return when the step that sent the last answer has ended, and is counted."""
    pipe._scheduler.ask(lambda _: None)


def plain(count: int = 12, **fields: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=count, ignore_eos=True, **fields)


@cache
def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A small picture, another for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Gate:
    """Holds up whoever passes until it is opened; `reached` once somebody came."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def passed(self) -> None:
        self.reached.set()
        assert self.open.wait(HANG_S)


class SlowFile:
    """The path of an image that takes until its gate opens."""

    def __init__(self, path: Path, gate: Gate) -> None:
        self._path, self._gate = path, gate

    def __fspath__(self) -> str:
        self._gate.passed()
        return str(self._path)


def answered(call: Callable[[], T]) -> T:
    """What `call` gives or raises; a failure if it never ends."""
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # noqa: BLE001 - handed to the test
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_S)
    assert outcome, "the call never ended"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def planned_steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """All that are planned from now on."""
    found, schedule = list[Step](), Scheduler.schedule

    def noted(scheduler: Scheduler) -> Step | None:
        step = schedule(scheduler)
        found.extend([] if step is None else [step])
        return step

    monkeypatch.setattr(Scheduler, "schedule", noted)
    return found


def at_once(pipe: Pipeline, prompts: Sequence[Any], configs: Any) -> list[Response]:
    """What a call gives whose prompts are queued, as many as may, before any is run."""
    inbox, begun, over = pipe._scheduler._inbox, threading.Event(), threading.Event()
    first = min(len(prompts), pipe._ahead)

    def question(_: object) -> None:
        begun.set()
        wait_until(lambda: over.is_set() or inbox.qsize() >= first)

    asked = ThreadPoolExecutor(1)
    waiting = asked.submit(pipe._scheduler.ask, question)
    # A worker that is no more answers, too, that it never comes to the question.
    wait_until(lambda: begun.is_set() or waiting.done())
    try:
        found = pipe(prompts, gen_config=configs)
    finally:
        over.set()  # or the worker would wait for prompts that were refused
        asked.shutdown()
    waiting.result()
    assert isinstance(found, list)
    return found
