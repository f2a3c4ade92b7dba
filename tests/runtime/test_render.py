"""Where images go in a prompt: goldens of the originals, and every rule of placement."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import HF, ORIGINAL
from prompt_setups import (
    PHOTO,
    Setup,
    assistant,
    hf_setup,
    original_setup,
    user,
)
from vlmforge.inputs.messages import Image, Message, Text
from vlmforge.inputs.template_choice import ActiveTemplate
from vlmforge.vl.constants import IMAGE_TOKEN


@pytest.fixture(params=["hf", "original"])
def setup(request: pytest.FixtureRequest) -> Setup:
    return {"hf": hf_setup, "original": original_setup}[request.param]()


# --- goldens -----------------------------------------------------------------------------------


def golden_cases(folder: Path) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((folder / "cases.json").read_text("utf-8"))["cases"]
    return cases


def hf_messages(case: dict[str, Any]) -> Iterator[Message]:
    for message in case["messages"]:
        blocks = message["content"]
        texts = (PHOTO if block["type"] == "image" else Text(block["text"]) for block in blocks)
        yield Message(message["role"], tuple(texts))


def original_messages(case: dict[str, Any], *, by_hand: bool) -> Iterator[Message]:
    for index, text in enumerate(case["messages"]):
        images = [PHOTO] * text.count("<image>")
        text = text if by_hand else text.replace("<image>\n", "")
        yield assistant(text) if index % 2 else user(text, *images)


HF_CASES, ORIGINAL_CASES = golden_cases(HF), golden_cases(ORIGINAL)


def test_there_are_goldens() -> None:
    for cases in (HF_CASES, ORIGINAL_CASES):
        names = {case["id"] for case in cases}
        assert {"single_photo", "single_tall", "text_only", "multi_turn"} <= names


@pytest.mark.parametrize("case", HF_CASES, ids=lambda case: case["id"])
def test_goldens_of_the_transformers_layout(case: dict[str, Any]) -> None:
    rendered = hf_setup().render(*hf_messages(case))
    assert rendered.text == case["prompt"]
    assert list(rendered.token_ids) == case["input_ids"]
    assert rendered.image_tokens == case["n_image_tokens"]


@pytest.mark.parametrize("by_hand", [False, True], ids=["beside", "in-text"])
@pytest.mark.parametrize("case", ORIGINAL_CASES, ids=lambda case: case["id"])
def test_goldens_of_the_original_layout(case: dict[str, Any], by_hand: bool) -> None:
    rendered = original_setup().render(*original_messages(case, by_hand=by_hand))
    assert rendered.text == case["prompt"]
    assert list(rendered.token_ids) == case["input_ids"]
    expanded = original_setup().render(*original_messages(case, by_hand=by_hand), length=576)
    assert len(expanded.token_ids) == case["expanded_len"]


# --- where images go ---------------------------------------------------------------------------


def test_images_go_before_a_single_text(setup: Setup) -> None:
    first = setup.render(user(PHOTO, PHOTO, "compare"))
    assert "USER: <image>\n<image>\ncompare ASSISTANT:" in first.text
    assert setup.render(user("compare", PHOTO, PHOTO)) == first


def test_image_token_places_the_image(setup: Setup) -> None:
    rendered = setup.render(user(f"left {IMAGE_TOKEN} right", PHOTO))
    assert "USER: left <image> right ASSISTANT:" in rendered.text
    assert IMAGE_TOKEN not in rendered.text
    by_hand = setup.render(user("left <image> right", PHOTO))
    assert by_hand == rendered


def test_between_several_texts_images_keep_their_place(setup: Setup) -> None:
    rendered = setup.render(user("first", PHOTO, PHOTO, "second"))
    assert "USER: first\n<image>\n<image>\nsecond ASSISTANT:" in rendered.text
    tokens = setup.render(user(f"first\n{IMAGE_TOKEN}\n{IMAGE_TOKEN}\nsecond", PHOTO, PHOTO))
    assert rendered == tokens
    assert "USER: one\ntwo ASSISTANT:" in setup.render(user("one", "two")).text


def test_image_tokens_are_counted_over_the_texts_of_a_message(setup: Setup) -> None:
    rendered = setup.render(user(PHOTO, f"a {IMAGE_TOKEN}", PHOTO, f"b {IMAGE_TOKEN} c"))
    assert "USER: a <image>\nb <image> c ASSISTANT:" in rendered.text


def test_an_image_alone_is_a_message() -> None:
    # As transformers renders a message whose only block is an image: no text, no space for it.
    assert hf_setup().render(user(PHOTO)).text == "USER: <image>\nASSISTANT:"
    assert original_setup().render(user(PHOTO)).text.endswith("USER: <image>\n ASSISTANT:")


def test_every_turn_may_have_images(setup: Setup) -> None:
    rendered = setup.render(user(PHOTO, "q1"), assistant("a1"), user(f"q2 {IMAGE_TOKEN}", PHOTO))
    assert [span.image for span in rendered.image_spans] == [0, 1]
    assert "<image>\nq1" in rendered.text
    assert "q2 <image>" in rendered.text


@pytest.mark.parametrize("length", [0, 1, 5, 576])
def test_spans_say_where_the_features_go(setup: Setup, length: int) -> None:
    rendered = setup.render(user("a", PHOTO, "b", PHOTO, PHOTO, "c"), length=length)
    ids = list(rendered.token_ids)
    assert [span.length for span in rendered.image_spans] == [length] * 3
    assert rendered.image_tokens == 3 * length
    assert rendered.text_tokens == len(ids) - 3 * length
    assert ids.count(setup.policy.image_token_id) == 3 * length
    for span in rendered.image_spans:
        assert ids[span.start : span.start + length] == [setup.policy.image_token_id] * length
    for span in reversed(rendered.image_spans):
        del ids[span.start : span.start + length]
    assert ids == list(setup.render(user("a", PHOTO, "b", PHOTO, PHOTO, "c"), length=0).token_ids)


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ((IMAGE_TOKEN,), "1 x <IMAGE_TOKEN> and 0 images"),
        ((IMAGE_TOKEN * 2, PHOTO), "2 x <IMAGE_TOKEN> and 1 image"),
        ((f"a {IMAGE_TOKEN}", PHOTO, PHOTO), "1 x <IMAGE_TOKEN> and 2 images"),
    ],
)
def test_a_wrong_number_of_image_tokens_is_refused(
    setup: Setup, blocks: tuple[str | Image, ...], found: str
) -> None:
    error = setup.refusal(user("hello"), assistant("hi"), user(*blocks))
    assert error.summary == "A message does not have one image token for each image."
    assert error.found == found
    images = sum(isinstance(block, Image) for block in blocks)
    assert error.expected.startswith(f"{images} x <IMAGE_TOKEN>")
    assert "<IMAGE_TOKEN>" in error.fix


def test_tokens_of_one_message_do_not_place_the_images_of_another(setup: Setup) -> None:
    error = setup.refusal(user(IMAGE_TOKEN), assistant("a"), user("q", PHOTO))
    assert error.found == "1 x <IMAGE_TOKEN> and 0 images"


def test_a_template_that_drops_images_is_refused(setup: Setup) -> None:
    deaf = ActiveTemplate("deaf", "{{ messages[0].content[-1].text }}", ())
    error = dataclasses.replace(setup, template=deaf).refusal(user(PHOTO, "q"))
    assert error.summary == "The prompt does not have one image token for each image."
    assert error.found == "0 x <IMAGE_TOKEN> and 1 image"
