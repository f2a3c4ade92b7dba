"""Parity with the original implementations, stage by stage, at the goldens' fp32 tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import DATA, golden_engine
from golden_models import (
    CASES,
    FOLDERS,
    TOLERANCES,
    Golden,
    check_answer,
    check_images,
    check_prompt,
)
from vlmforge import GenerationConfig, pipeline

LIMITS = TOLERANCES["float32"]
Open = Callable[[str], Golden]


@pytest.fixture(scope="module")
def golden(shared: Path) -> Iterator[Open]:
    """Golden checkpoints by name, each with a pipeline that is opened once."""
    opened: dict[str, Golden] = {}
    with ExitStack() as stack:

        def open_one(name: str) -> Golden:
            if name not in opened:
                pipe = stack.enter_context(pipeline(golden_engine(shared, name)))
                opened[name] = Golden(name, pipe)
            return opened[name]

        yield open_one


def test_the_goldens_are_found() -> None:
    assert {"llava_1_5_hf", "llava_v1_5_liuhaotian", "yi_vl"} <= set(FOLDERS)
    assert len(CASES) >= 4 * len(FOLDERS)


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_prompt_text_and_token_ids_are_exact(golden: Open, folder: str, name: str) -> None:
    check_prompt(golden(folder), name)


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_greedy_tokens_and_last_logits(golden: Open, folder: str, name: str) -> None:
    check_answer(golden(folder), name, LIMITS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_pixels_and_features_of_every_golden_image(golden: Open, folder: str) -> None:
    check_images(golden(folder), LIMITS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_prompt_given_verbatim(golden: Open, folder: str) -> None:
    model = golden(folder)
    case = model.case("single_photo")
    image = str(DATA / case["images"][0])
    config = GenerationConfig(max_new_tokens=len(case["greedy_tokens"]))
    templated = model.pipe(model.messages(case), gen_config=config)
    verbatim = model.pipe((case["prompt"], image), gen_config=config, do_preprocess=False)
    assert verbatim.token_ids == templated.token_ids
