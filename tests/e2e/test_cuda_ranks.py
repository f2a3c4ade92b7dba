"""Engines of the target cuda for several ranks, each a process, with the processor for its GPU."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from conftest import HANGS, HF, IMAGES, cuda_engine, wait_until
from golden_models import TOLERANCES, Golden, cases_of, check_answer, check_prompt
from late_device import late_cuda_on_cpu
from vlmforge import EngineConfig, GenerationConfig, Pipeline, VisionConfig, pipeline
from vlmforge.api.load import serve
from vlmforge.backends import DecoderSession
from vlmforge.backends.choice import ChoosingDecoder
from vlmforge.backends.fake import cuda_on_cpu
from vlmforge.backends.ranks.calls import NextTokens, RankedDecoder
from vlmforge.backends.ranks.overlapping import OverlappingRanks
from vlmforge.backends.ranks.processes import Processes
from vlmforge.cli.inspect import describe
from vlmforge.engine.bundle import open_bundle
from vlmforge.engine.static_check import check_static
from vlmforge.errors import BackendUnavailableError, ConfigError, RankError

pytestmark = pytest.mark.usefixtures("patient_ranks")
LIMITS = TOLERANCES["float16"]
PICTURE = str(IMAGES / "tall_300x900.png")
PROMPTS = ["hi", ("What is this?", PICTURE), "One more, and longer than the first.", "hi"]
GREEDY = GenerationConfig(max_new_tokens=12, ignore_eos=True)
DRAWN = GenerationConfig(max_new_tokens=8, top_k=40, temperature=1.0, random_seed=7, logprobs=2)


@pytest.fixture(scope="module")
def engine(shared: Path) -> Path:
    return cuda_engine(shared, HF.name, "--tp", "2")


@pytest.fixture(scope="module")
def two(engine: Path) -> Iterator[Pipeline]:
    # A test has two pipelines write to the same pages, one after the other.
    config = EngineConfig(max_batch_size=4, enable_prefix_caching=False)
    with cuda_on_cpu(), pipeline(engine, config) as pipe:
        yield pipe


@pytest.mark.parametrize("name", [case["id"] for case in cases_of(HF.name)])
def test_every_golden_case(two: Pipeline, name: str) -> None:
    golden = Golden(HF.name, two)
    check_prompt(golden, name)
    check_answer(golden, name, LIMITS)


def test_what_is_told_of_it(engine: Path) -> None:
    """Sums but the last, of which only some rows are normalised, are made with their norm."""
    bundle = open_bundle(engine)
    chain = bundle.manifest.part("decoder").chain
    assert chain is not None
    normed = [call.norm is not None for call in chain.collectives if call.kind == "all_reduce"]
    assert normed == [True] * (len(normed) - 1) + [False] and len(normed) > 2
    words = f"{len(normed) - 1} with the norm behind it"
    assert f"{len(normed) + 1} meetings of the ranks ({words})" in describe(engine)
    results = [result for result in check_static(bundle) if result.check == "ranks"]
    assert all(result.passed and words in result.detail for result in results[1:])
    files = tuple(
        structs.replace(e, size=64) if e.path.endswith(".data") else e
        for e in bundle.manifest.files
    )
    short = structs.replace(bundle, manifest=structs.replace(bundle.manifest, files=files))
    failed = [result for result in check_static(short) if not result.passed]
    scales = [result.detail for result in failed if result.check == "ranks"]
    assert len(scales) == 2 and all("no scale for" in detail for detail in scales)
    assert {result.check for result in failed} == {"ranks", "weights"}


def test_a_batch_is_as_each_of_it_alone(two: Pipeline) -> None:
    together = [answer.token_ids for answer in two(PROMPTS, GREEDY)]
    assert together == [two(prompt, GREEDY).token_ids for prompt in PROMPTS]


class OnTheHost(DecoderSession):
    """A decoder whose logits are all that is seen of it."""

    def __init__(self, inner: DecoderSession) -> None:
        self.step, self.move = inner.step, inner.move  # type: ignore[method-assign]


def test_tokens_are_chosen_on_the_first_ones_device_as_the_host_would(two: Pipeline) -> None:
    decoder = two._engine.decoder
    assert isinstance(decoder, ChoosingDecoder) and decoder.chooses
    config = EngineConfig(enable_prefix_caching=False)
    hosted = serve(
        dataclasses.replace(two._engine, decoder=OnTheHost(decoder)), config, VisionConfig()
    )
    for config in (GREEDY, DRAWN):
        chosen, expected = two(PROMPTS, config), hosted(PROMPTS, config)
        assert [answer.token_ids for answer in chosen] == [a.token_ids for a in expected]


def test_a_cache_that_cannot_be_read_is_refused_and_nothing_ends(two: Pipeline) -> None:
    with pytest.raises(BackendUnavailableError, match="does not hand out"):
        two._engine.decoder.read((0,), 1)
    assert two("hi", GREEDY).token_ids


def test_a_rank_is_killed_while_the_first_one_waits_for_its_gpu(engine: Path) -> None:
    """What waits on the GPU is told to stop; then it is said who is gone."""
    with cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=1)) as pipe:
        decoder = pipe._engine.decoder
        assert isinstance(decoder, RankedDecoder)
        others = decoder._others
        assert isinstance(others, Processes)
        told = Waiting()
        others.communicator.watch(told.stop)
        os.kill(others._children[1].pid, signal.SIGKILL)
        assert told.event.wait(HANGS)
        with pytest.raises(RankError, match="Rank 1 of 2 failed") as caught:
            others.communicator.check()
        assert "signal 9" in caught.value.found
        with pytest.raises(RankError, match="Rank 1 of 2 failed"):
            pipe("hi", GREEDY)


def test_a_rank_is_killed_between_a_step_and_what_it_gives(engine: Path) -> None:
    """What is under way ends with it, and so do steps that were begun behind."""
    long = GenerationConfig(max_new_tokens=200, ignore_eos=True)
    with late_cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=2)) as pipe:
        decoder = pipe._engine.decoder
        assert isinstance(decoder, OverlappingRanks) and isinstance(decoder._others, Processes)
        begin, begun = decoder.begin, itertools.count()
        child = decoder._others._children[1]

        def killed_behind(*arguments: Any) -> Any:
            made = begin(*arguments)
            if next(begun) == 5:
                child.kill()
            return made

        decoder.begin = killed_behind  # type: ignore[method-assign]
        answers = pipe(["hi", "so"], long)
        assert isinstance(answers, list)
        assert [answer.finish_reason for answer in answers] == ["error"] * 2
        assert all("signal 9" in answer.error_message for answer in answers)
        with pytest.raises(RankError, match="Rank 1 of 2 failed"):
            pipe("hi", GREEDY)
        wait_until(lambda: child.poll() is not None)


def test_a_rank_that_cannot_follow_says_why(engine: Path) -> None:
    with cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=1)) as pipe:
        decoder = pipe._engine.decoder
        assert isinstance(decoder, OverlappingRanks)
        decoder._others.tell(NextTokens(None, np.zeros(1, np.int64), chosen=False))  # type: ignore[arg-type]
        with pytest.raises(RankError, match="Rank 1 of 2 failed") as caught:
            pipe("hi", GREEDY)
        assert "rank 1: AttributeError: " in caught.value.found


def test_who_waits_for_a_device_hears_what_a_rank_says_last(engine: Path) -> None:
    """At once, though the rank may be busy with its end for long."""
    with cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=1)) as pipe:
        decoder = pipe._engine.decoder
        assert isinstance(decoder, OverlappingRanks) and isinstance(decoder._others, Processes)
        told = Waiting()
        decoder._others.communicator.watch(told.stop)
        decoder._others.tell(NextTokens(None, np.zeros(1, np.int64), chosen=False))  # type: ignore[arg-type]
        assert told.event.wait(HANGS)
        with pytest.raises(RankError) as caught:
            decoder._others.communicator.check()
        assert "rank 1: AttributeError: " in caught.value.found


def test_a_pipeline_is_closed_with_steps_under_way(engine: Path) -> None:
    with late_cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=2)) as pipe:
        decoder = pipe._engine.decoder
        assert isinstance(decoder, OverlappingRanks) and isinstance(decoder._others, Processes)
        child, begin, begun = decoder._others._children[1], decoder.begin, itertools.count()

        def held(*arguments: Any) -> Any:
            made = begin(*arguments)
            if next(begun) == 3:
                wait_until(lambda: pipe._scheduler._stopping)
            return made

        decoder.begin = held  # type: ignore[method-assign]
        pieces = pipe.stream_infer("hi", GenerationConfig(max_new_tokens=40, ignore_eos=True))
        next(pieces)
        pipe.close()
        assert list(pieces)[-1].finish_reason == "abort"
    wait_until(lambda: child.poll() is not None)


class Waiting:
    """What a GPU's meetings are to those who look after the ranks."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def stop(self) -> None:
        self.event.set()


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"devices": [0]}, ConfigError, "no device for each rank"),
        ({"devices": [1, 1]}, ConfigError, "no device for each rank"),
        ({"communicator": "mpi", "tp": 2}, ConfigError, "processes that mpirun has started"),
    ],
)
def test_what_ranks_on_gpus_cannot_be(engine: Path, fields: Any, error: Any, words: str) -> None:
    with cuda_on_cpu(), pytest.raises(error, match=words):
        pipeline(engine, EngineConfig(**fields))
