"""Graphs lowered for GPUs, run by ONNX Runtime, answer every golden case as the originals do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from conftest import golden_engine
from golden_models import (
    CASES,
    FOLDERS,
    TOLERANCES,
    TWINS,
    Golden,
    cases_of,
    check_answer,
    check_images,
)
from lowered_decoder import NativeDecoder, PagedDecoder, Vision, filled, model_spec, part_of
from vlmforge import EngineConfig, Pipeline, pipeline
from vlmforge.backends import DecoderBatch, DecoderSession
from vlmforge.kv.cache import Copy, Drop
from vlmforge.runner.features import FeatureCache
from vlmforge.scheduler.loop import Loop

LIMITS = TOLERANCES["float32"]
SLOTS = 3
LOWERINGS = {"native": NativeDecoder, "paged": PagedDecoder}


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A golden checkpoint by the lowered graphs, and the decoder that was built for CPUs."""

    goldens: dict[str, Golden]
    original: DecoderSession


def needed(folder: str) -> int:
    """Tokens that the longest case takes, up to whole pages and a page more."""
    longest = max(
        case.get("expanded_len", len(case["input_ids"])) + len(case["greedy_tokens"])
        for case in cases_of(folder)
    )
    return (longest // 16 + 2) * 16


def open_lowered(shared: Path, folder: str, stack: ExitStack) -> Lowered:
    config = EngineConfig(threads=1, max_batch_size=SLOTS)
    pipe = stack.enter_context(pipeline(golden_engine(shared, folder), config))
    spec, capacity, goldens = model_spec(folder), needed(folder), {}
    vision, traced = Vision(spec), filled(spec, part_of(spec, "decoder"))
    for name, make in LOWERINGS.items():
        engine = dataclasses.replace(
            pipe._engine,
            vision=vision,
            decoder=make(traced, SLOTS, capacity),
            options=structs.replace(pipe._engine.options, slots=SLOTS, capacity=capacity),
        )
        features = FeatureCache(engine.encode, batch=1)
        loop = Loop(engine, features, chunk=512, reuse_prefixes=True)
        goldens[name] = Golden(
            folder, stack.enter_context(Pipeline(engine, loop, max_queued_requests=64))
        )
    return Lowered(goldens, pipe._engine.decoder)


Open = Callable[[str], Lowered]


@pytest.fixture(scope="module")
def lowered(shared: Path) -> Iterator[Open]:
    opened: dict[str, Lowered] = {}
    with ExitStack() as stack:

        def open_one(folder: str) -> Lowered:
            if folder not in opened:
                opened[folder] = open_lowered(shared, folder, stack)
            return opened[folder]

        yield open_one


def nightly(*values: str, more: bool = False) -> Any:
    """A row of a grid; of each architecture's twin, and where there are `more` rows, at night."""
    return pytest.param(*values, marks=[pytest.mark.nightly] * (more or values[0] in TWINS))


# The first case by both, the others by one and the other in turn.
GRID = [
    nightly(folder, name, lowering, more=name != "single_photo" and (row + turn) % 2 > 0)
    for row, (folder, name) in enumerate(CASES)
    for turn, lowering in enumerate(LOWERINGS)
]


@pytest.mark.parametrize(("folder", "name", "lowering"), GRID)
def test_greedy_tokens_and_logits(lowered: Open, folder: str, name: str, lowering: str) -> None:
    check_answer(lowered(folder).goldens[lowering], name, LIMITS)


@pytest.mark.parametrize("folder", [nightly(folder) for folder in FOLDERS])
def test_features_of_every_golden_image(lowered: Open, folder: str) -> None:
    check_images(lowered(folder).goldens["native"], LIMITS)


def transcript(golden: Golden, decoder: DecoderSession) -> list[np.ndarray]:
    """Two prompts, one of them copied, then decoded together out of order, with ragged lengths."""
    vocab = golden.pipe._engine.manifest.decode.vocab_size
    has_levels = golden.pipe._engine.manifest.decode.positions.has_levels
    ids = np.random.default_rng(3).integers(3, vocab, 60)
    last = np.array([[0]])

    def step(slots: tuple[int, ...], rows: np.ndarray, past: list[int]) -> np.ndarray:
        levels = np.zeros(len(rows), np.int64) if has_levels else None
        places = last.repeat(len(rows), 0) + rows.shape[1] - 1
        return decoder.step(DecoderBatch(slots, rows, np.array(past), None, places, levels))

    found = [step((0,), ids[None, :37], [0]), step((2,), ids[None, 37:50], [0])]
    found.append(step((0,), ids[None, 50:53], [37]))  # a second chunk
    decoder.move(Copy(0, 1, 21))
    found.append(step((1,), ids[None, 21:30], [21]))  # goes on from the copy, apart from its source
    found.append(step((2, 0), ids[53:55, None], [13, 40]))  # the one between them is not asked
    decoder.move(Drop(2, 10))
    found.append(step((2,), ids[None, 40:43], [10]))  # what is behind is written anew
    found.append(step((1, 2, 0), ids[53:56, None], [30, 13, 41]))
    return found


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("folder", [nightly(folder) for folder in FOLDERS])
def test_slots_are_those_of_the_cpu_engine(lowered: Open, folder: str, lowering: str) -> None:
    model = lowered(folder)
    golden = model.goldens[lowering]
    ours = transcript(golden, golden.pipe._engine.decoder)
    theirs = transcript(golden, model.original)
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
