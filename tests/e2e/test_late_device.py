"""A device that does everything late, while the next step is begun: the same answers.

So do those of two ranks, of which the other one does what it is told, and is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import HF, IMAGES, cuda_engine, wait_until
from late_device import LateDevice, late_cuda_on_cpu
from stand_in import at_once, settle
from vlmforge import EngineConfig, GenerationConfig, Pipeline, VisionConfig, pipeline
from vlmforge.api.load import serve
from vlmforge.backends.cuda.decoder import PagedDecoder
from vlmforge.backends.ranks.overlapping import OverlappingRanks
from vlmforge.kv.blocks import BlockPool
from vlmforge.outputs.response import Response

pytestmark = pytest.mark.usefixtures("patient_ranks")
PHOTO = str(IMAGES / "photo_640x480.png")
PROMPTS: list[object] = ["hi", ("What is it?", PHOTO), "a b c", "Write a line.", "so", "number 6"]
GREEDY = GenerationConfig(max_new_tokens=13, ignore_eos=True)
SAMPLED = replace(GREEDY, top_k=40, top_p=0.9, temperature=0.8, random_seed=5)
KINDS = {
    "likeliest": [replace(GREEDY, max_new_tokens=n) for n in (13, 4, 9, 1, 12, 7)],
    "drawn": [replace(SAMPLED, max_new_tokens=n, random_seed=n) for n in (13, 4, 9, 1, 12, 7)],
    "mixed": [
        GREEDY,
        replace(SAMPLED, n=2),
        replace(GREEDY, logprobs=3),
        replace(SAMPLED, repetition_penalty=1.3),
        replace(SAMPLED, min_new_tokens=5, ignore_eos=False),
        replace(GREEDY, bad_words=["a"]),
    ],
}


@pytest.fixture(scope="module", params=["one rank", "two ranks"])
def loaded(shared: Path, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    divided = ("--tp", "2") if request.param == "two ranks" else ()
    engine = cuda_engine(shared, HF.name, *divided)
    with late_cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=4)) as opened:
        decoder = opened._engine.decoder
        if isinstance(decoder, OverlappingRanks):
            decoder.close = lambda: None  # type: ignore[method-assign]  # by those on the same one
        yield opened
        if isinstance(decoder, OverlappingRanks):
            del decoder.close


def device(pipe: Pipeline) -> LateDevice:
    decoder = pipe._engine.decoder
    decoder = decoder.own if isinstance(decoder, OverlappingRanks) else decoder
    assert isinstance(decoder, PagedDecoder)
    assert isinstance(decoder._device, LateDevice)
    return decoder._device


def pool(pipe: Pipeline) -> BlockPool:
    cache = pipe._scheduler._jobs._cache
    assert isinstance(cache, BlockPool)
    return cache


def fresh(loaded: Pipeline, *, one_by_one: bool = False) -> Pipeline:
    """A pipeline on the same engine, whose pages are its own while it is open."""
    engine = replace(loaded._engine)
    if one_by_one:
        object.__setattr__(engine, "overlapping", None)
    return serve(engine, EngineConfig(), VisionConfig())


def said(responses: list[Response]) -> list[tuple[object, ...]]:
    every = [answer for response in responses for answer in response.choices]
    return [(r.text, r.token_ids, r.finish_reason, r.logprobs) for r in every]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_steps_one_after_the_other(loaded: Pipeline, kind: str) -> None:
    with fresh(loaded, one_by_one=True) as plain:
        wanted = said(at_once(plain, PROMPTS, KINDS[kind]))
        settle(plain)
        assert device(plain).taken_most() <= 1
    with fresh(loaded) as pipe:
        assert said(at_once(pipe, PROMPTS, KINDS[kind])) == wanted
        settle(pipe)
        assert device(pipe).taken_most() > (0 if kind == "mixed" else 1)
        assert pool(pipe).free_blocks == pool(pipe).blocks


def test_a_word_that_ends_an_answer_is_found_while_the_next_step_runs(loaded: Pipeline) -> None:
    long = replace(GREEDY, max_new_tokens=30)
    with fresh(loaded) as pipe:
        whole, other = at_once(pipe, ["hi", "so"], [long, long])
        word = whole.text[len(whole.text) // 2 :][:3]
        first, second = at_once(pipe, ["hi", "so"], [replace(long, stop_words=[word]), long])
    assert (first.text, first.finish_reason) == (whole.text[: whole.text.index(word)], "stop")
    assert second.token_ids == other.token_ids


def test_cancels_leave_no_page(loaded: Pipeline) -> None:
    with fresh(loaded) as pipe:
        for number in range(6):
            pieces = pipe.stream_infer(f"number {number}", replace(GREEDY, max_new_tokens=200))
            for _ in range(number % 3 + 1):
                next(pieces)
            pieces.close()
        wait_until(lambda: pool(pipe).free_blocks == pool(pipe).blocks)
