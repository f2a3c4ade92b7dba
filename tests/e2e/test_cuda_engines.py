"""Engines of the target cuda, run by the processor in the GPU's place, answer as the originals do.

The very files that a GPU would load, in float16: the chain, the pool of pages, the buckets and the
scheduler are those of a GPU; what is not is listed in `vlmforge.backends.fake`.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from conftest import HF, IMAGES, cuda_engine, wait_until
from golden_models import (
    CASES,
    FOLDERS,
    TOLERANCES,
    TWINS,
    Golden,
    check_answer,
    check_images,
    check_prompt,
)
from stand_in import Gate, at_once
from vlmforge import EngineConfig, GenerationConfig, Pipeline, VisionConfig, pipeline
from vlmforge.api.load import serve
from vlmforge.backends import DecoderBatch, FloatArray
from vlmforge.backends.choice import BegunFirst
from vlmforge.backends.cuda.decoder import PagedDecoder
from vlmforge.backends.fake import HostDevice, cuda_on_cpu
from vlmforge.errors import CancelledError
from vlmforge.kv.blocks import BlockPool
from vlmforge.kv.cache import Move
from vlmforge.runner.decoder_input import PromptPart
from vlmforge.runner.stages import Engine

LIMITS = TOLERANCES["float16"]
PHOTO, TALL = str(IMAGES / "photo_640x480.png"), str(IMAGES / "tall_300x900.png")
PROMPTS: list[object] = [
    "Write one line about cats.",
    ("What is shown in this image?", PHOTO),
    ("Compare these.", [TALL, PHOTO]),
    "hi",
    ("What is shown in this image?", TALL),
]
CONFIGS = [GenerationConfig(max_new_tokens=n, ignore_eos=True) for n in (24, 3, 17, 1, 9)]


@pytest.fixture(scope="module")
def golden(shared: Path) -> Iterator[Callable[[str], Golden]]:
    opened: dict[str, Golden] = {}
    with ExitStack() as stack:
        stack.enter_context(cuda_on_cpu())

        def open_one(name: str) -> Golden:
            if name not in opened:
                pipe = stack.enter_context(pipeline(cuda_engine(shared, name)))
                opened[name] = Golden(name, pipe)
            return opened[name]

        yield open_one


def marked(folder: str, *values: str) -> Any:
    marks = [pytest.mark.nightly] if folder in TWINS else []
    return pytest.param(folder, *values, marks=marks)


@pytest.mark.parametrize(("folder", "name"), [marked(*case) for case in CASES])
def test_every_golden_case(golden: Callable[[str], Golden], folder: str, name: str) -> None:
    check_prompt(golden(folder), name)
    check_answer(golden(folder), name, LIMITS)


@pytest.mark.parametrize("folder", [marked(folder) for folder in FOLDERS])
def test_features_of_every_golden_image(golden: Callable[[str], Golden], folder: str) -> None:
    check_images(golden(folder), LIMITS)


# --- many at once ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(shared: Path) -> Path:
    return cuda_engine(shared, HF.name)


@pytest.fixture(scope="module")
def pipe(engine: Path) -> Iterator[Pipeline]:
    with cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=4)) as opened:
        yield opened


@pytest.fixture(scope="module")
def singles(pipe: Pipeline) -> list[list[int]]:
    found = [pipe(p, gen_config=c) for p, c in zip(PROMPTS, CONFIGS, strict=True)]
    return [answer.token_ids for answer in found]  # type: ignore[union-attr]


def device(pipe: Pipeline) -> HostDevice:
    decoder = pipe._engine.decoder
    assert isinstance(decoder, PagedDecoder)
    assert isinstance(decoder._device, HostDevice)
    return decoder._device


def pool(pipe: Pipeline) -> BlockPool:
    cache = pipe._scheduler._jobs._cache
    assert isinstance(cache, BlockPool)
    return cache


def small(pipe: Pipeline, blocks: int, **fields: int) -> Pipeline:
    """A pipeline on the same engine with fewer pages."""
    options = structs.replace(pipe._engine.options, budget=blocks)
    return serve(
        dataclasses.replace(pipe._engine, options=options), EngineConfig(**fields), VisionConfig()
    )


def test_batches_in_any_order_equal_singles(pipe: Pipeline, singles: list[list[int]]) -> None:
    before = device(pipe).replays
    for seed in range(2):
        order = random.Random(seed).sample(range(len(PROMPTS)), len(PROMPTS))
        responses = pipe([PROMPTS[i] for i in order], gen_config=[CONFIGS[i] for i in order])
        assert isinstance(responses, list)
        assert [r.token_ids for r in responses] == [singles[i] for i in order]
    assert device(pipe).replays > before  # they were decoded by what was captured


def test_ids_alone_give_what_logits_give(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real = PagedDecoder.begin

    def noted(decoder: PagedDecoder, batch: DecoderBatch, choices: Any, ahead: Any) -> Any:
        if choices is None:
            steps.append(len(batch.slots))
        return real(decoder, batch, choices, ahead)

    monkeypatch.setattr(PagedDecoder, "begin", noted)
    texts = [f"number {n}, and so on" for n in range(4)]
    plain = GenerationConfig(max_new_tokens=12, ignore_eos=True)
    whole = dataclasses.replace(plain, output_logits="generation")
    by_ids = [answer.token_ids for answer in at_once(pipe, texts, plain)]
    assert max(steps) == 4 and min(steps) >= 1
    steps.clear()
    by_logits = [answer.token_ids for answer in pipe(texts, gen_config=whole)]  # type: ignore[union-attr]
    assert by_ids == by_logits
    assert steps == []  # one who wants the logits is not asked


@pytest.mark.parametrize(
    "ways",
    [
        {},
        {1: {"do_sample": True, "top_k": 0, "temperature": 1.1, "random_seed": 7}},
        {0: {"repetition_penalty": 1.3}, 4: {"output_logits": "generation"}},
    ],
    ids=["likeliest", "sampled", "one on the host"],
)
def test_prompts_of_several_lengths_and_pictures_run_together(
    pipe: Pipeline,
    singles: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    ways: dict[int, dict[str, Any]],
) -> None:
    """In one step, and each answers as it does alone."""
    together: list[list[tuple[int, int]]] = []
    real = Engine.begin_first

    def noted(engine: Engine, parts: Sequence[PromptPart], choices: Any) -> BegunFirst:
        together.append([(part.past, len(part.chunk.ids)) for part in parts])
        assert choices is None or any(choices)
        return real(engine, parts, choices)

    monkeypatch.setattr(Engine, "begin_first", noted)
    order = [0, 1, 4, 3]
    configs = [dataclasses.replace(CONFIGS[i], **ways.get(i, {})) for i in order]
    with small(pipe, 64) as fresh:
        alone = [
            fresh(PROMPTS[i], gen_config=config) for i, config in zip(order, configs, strict=True)
        ]
    together.clear()
    with small(pipe, 64) as fresh:
        answers = at_once(fresh, [PROMPTS[i] for i in order], configs)
    assert [a.token_ids for a in answers] == [a.token_ids for a in alone]  # type: ignore[union-attr]
    plain = [(a, singles[i]) for a, i in zip(answers, order, strict=True) if i not in ways]
    assert all(answer.token_ids == single for answer, single in plain)
    assert [len(parts) for parts in together] == [4]
    assert len({length for parts in together for _, length in parts}) == 3, together


def test_long_prompts_run_in_larger_parts_where_they_are_asked_for(engine: Path) -> None:
    text = " ".join(f"word {n}," for n in range(110))
    config = GenerationConfig(max_new_tokens=4, ignore_eos=True)
    answers, parts = [], []
    for chunk in (512, 2048):
        fields = EngineConfig(max_batch_size=1, max_prefill_token_num=chunk)
        with cuda_on_cpu(), pipeline(engine, fields) as opened:
            assert 512 < opened.count_tokens(text) < 1000
            parts.append(opened._engine.options.chunk)
            answers.append(opened(text, gen_config=config).token_ids)  # type: ignore[union-attr]
    assert parts == [512, 1024]  # no more than its window
    assert answers[0] == answers[1]


SAMPLED = [
    GenerationConfig(max_new_tokens=14, ignore_eos=True, random_seed=seed, **settings)
    for seed, settings in enumerate(
        (
            {"top_k": 40, "top_p": 0.8, "temperature": 0.6},
            {"top_k": 0, "temperature": 1.2, "repetition_penalty": 1.3, "logprobs": 3},
            {"top_k": 0, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.2},
            {"top_k": 50, "min_p": 0.1, "output_logits": "generation"},
            {"top_k": 1, "bad_words": ["a"], "min_new_tokens": 3},
        )
    )
]


def by_host(pipe: Pipeline) -> Pipeline:
    """A pipeline on the same engine whose decoder chooses no tokens."""
    engine = dataclasses.replace(pipe._engine)
    object.__setattr__(engine, "choosing", None)
    object.__setattr__(engine, "overlapping", None)
    return serve(engine, EngineConfig(), VisionConfig())


def test_the_device_chooses_what_the_host_would(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone or in company, and gives logits only to those that ask for them."""
    texts: list[object] = [f"number {n}, and so on" for n in range(len(SAMPLED))]
    rows: list[int] = []
    real = PagedDecoder._row

    def noted(decoder: PagedDecoder, logits: int, row: int) -> FloatArray:
        rows.append(row)
        return real(decoder, logits, row)

    with by_host(pipe) as plain:
        wanted = [plain(t, gen_config=c) for t, c in zip(texts, SAMPLED, strict=True)]
    alone = [pipe(t, gen_config=c) for t, c in zip(texts, SAMPLED, strict=True)]
    monkeypatch.setattr(PagedDecoder, "_row", noted)
    together = pipe(texts, gen_config=SAMPLED)
    for one, other, third in zip(wanted, alone, together, strict=True):
        assert one.token_ids == other.token_ids == third.token_ids  # type: ignore[union-attr]
    assert len(rows) == 13  # of the one request that wants them, after its first token
    for answers in (alone, together):
        found = [list(top) for top in answers[1].logprobs]  # type: ignore[index, union-attr]
        assert found == [list(top) for top in wanted[1].logprobs]  # type: ignore[union-attr]
        assert answers[3].logits.shape[0] == 14  # type: ignore[index, union-attr]


def test_sizes_are_captured_once(pipe: Pipeline, singles: list[list[int]]) -> None:
    del singles
    config = GenerationConfig(max_new_tokens=40, ignore_eos=True)
    pipe("a", gen_config=config)
    before = device(pipe).captures, device(pipe).replays
    pipe("b", gen_config=config)
    assert device(pipe).captures == before[0]
    assert device(pipe).replays == before[1] + 39


@pytest.mark.parametrize("fields", [{}, {"max_prefill_token_num": 37}], ids=str)
def test_a_pool_that_is_full_preempts_and_changes_no_token(
    pipe: Pipeline, singles: list[list[int]], fields: dict[str, int]
) -> None:
    page = pipe._engine.options.block_size
    longest = max(pipe.count_tokens(prompt) for prompt in PROMPTS) + 24
    with small(pipe, -(-longest // page), **fields) as tight:
        responses = tight(PROMPTS[::-1], gen_config=CONFIGS[::-1])
    assert isinstance(responses, list)
    assert [r.token_ids for r in responses] == singles[::-1]


def test_prompts_that_begin_alike_share_pages(pipe: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True)
    with small(pipe, 64) as fresh:
        first = fresh(("Tell me all about it.", PHOTO), gen_config=config)
        again = fresh(("Tell me all about it.", PHOTO), gen_config=config)
    page = pipe._engine.options.block_size
    assert first.token_ids == again.token_ids
    assert again.cached_tokens == (again.input_token_len - 1) // page * page > 0


def test_several_answers_part_on_pages_of_their_own(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Move] = []
    real = PagedDecoder.move

    def noted(decoder: PagedDecoder, move: Move) -> None:
        copies.append(move)
        real(decoder, move)

    monkeypatch.setattr(PagedDecoder, "move", noted)
    sampled = GenerationConfig(max_new_tokens=12, ignore_eos=True, top_k=50, random_seed=3)
    several = dataclasses.replace(sampled, n=3)
    with small(pipe, 64) as fresh:
        alone = fresh("Tell me about cats.", gen_config=sampled)
        answers = fresh("Tell me about cats.", gen_config=several).choices
        assert len({tuple(answer.token_ids) for answer in answers}) == 3
        assert answers[0].token_ids == alone.token_ids
    assert len(copies) == 2  # the last page of the prompt, for all but one


def test_cancelled_requests_leave_no_page(pipe: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=200, ignore_eos=True)
    with small(pipe, 64) as fresh:
        everything = pool(fresh).free_blocks
        for number in range(20):
            pieces = fresh.stream_infer(f"number {number}", config)
            for _ in range(number % 3):
                next(pieces)
            pieces.close()  # type: ignore[attr-defined]
        wait_until(lambda: pool(fresh).free_blocks == everything)


def test_a_conversation_goes_on_where_it_was(pipe: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=6)
    with small(pipe, 64) as fresh:
        session = fresh.chat(("What is shown?", PHOTO), gen_config=config)
        session = fresh.chat("Are you sure?", session=session, gen_config=config)
        assert session.response.cached_tokens >= pipe._engine.options.block_size
        assert session.response.timings.cached_images == 1


def test_the_logits_of_a_whole_prompt(pipe: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=2, output_logits="all")
    answer = pipe(PROMPTS[0], gen_config=config)
    assert answer.logits is not None
    assert len(answer.logits) == answer.input_token_len + 1
    assert np.isfinite(answer.logits).all()


def test_closing_gives_the_devices_memory_back(engine: Path) -> None:
    """While the pipeline is still held: pages, weights, and what is captured."""
    with cuda_on_cpu(), pipeline(engine) as opened:
        opened(PROMPTS[1], gen_config=CONFIGS[1])  # type: ignore[arg-type]
        decoder = opened._engine.decoder
        assert isinstance(decoder, PagedDecoder)
        parts = (decoder, decoder._program, decoder._device, opened._engine.vision)
        known = [weakref.ref(part) for part in parts]
        del decoder, parts
    assert [one() for one in known] == [None] * 4


def test_closing_ends_what_is_in_flight(engine: Path) -> None:
    with cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=1)) as opened:
        gate, seen = Gate(), itertools.count()

        def held_up(_: list[int], logits: Any) -> Any:
            if next(seen) == 20:  # it is in flight, however late the pipeline is closed
                gate.passed()
            return logits

        config = GenerationConfig(max_new_tokens=900, ignore_eos=True, logits_processors=[held_up])
        pieces = opened.stream_infer("go on", config)
        next(pieces)
        threading.Thread(target=opened.close).start()
        wait_until(lambda: opened._scheduler._stopping)
        gate.open.set()
        with pytest.raises(CancelledError):
            for piece in pieces:
                if piece.finish_reason == "abort":
                    raise CancelledError("it was aborted")
