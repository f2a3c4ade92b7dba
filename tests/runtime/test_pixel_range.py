"""Limits of pixels in messages: where they may stand, and what is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stand_in import plain, png, stand_in
from vlmforge.engine.images.pixels import AS_ENGINE, PixelRange
from vlmforge.errors import PromptError
from vlmforge.inputs.messages import parse_prompt

LIMITS = {"min_pixels": 784, "max_pixels": 7840}
URL = {"url": "a.png"}
FORMS: list[dict[str, Any]] = [
    {"type": "image", "image": "a.png", **LIMITS},
    {"type": "image", "path": "a.png", **LIMITS},
    {"type": "image_url", "image_url": {**URL, **LIMITS}},
    {"type": "image_url", "image_url": URL, **LIMITS},
    {"type": "image_url", "image_url": "a.png", **LIMITS},
    {"type": "image_url", "image_url": {**URL, "min_pixels": 784}, "max_pixels": 7840},
    {"type": "image_url", "image_url": {**URL, **LIMITS}, **LIMITS},
    {"type": "image_data", "image_data": {"data": "a.png", **LIMITS}},
]


def asked(part: dict[str, Any]) -> PixelRange:
    (image,) = parse_prompt([{"role": "user", "content": [part]}]).images
    assert image.source == "a.png"
    return image.pixel_range


@pytest.mark.parametrize("part", FORMS, ids=range(len(FORMS)))
def test_every_form_of_an_image_takes_them(part: dict[str, Any]) -> None:
    assert asked(part) == PixelRange(784, 7840)


@given(st.one_of(st.none(), st.integers(1, 1 << 63)), st.one_of(st.none(), st.integers(1, 1 << 63)))
def test_what_is_left_out_is_the_engines(least: int | None, most: int | None) -> None:
    given = {"min_pixels": least, "max_pixels": most}
    assert asked({"type": "image", "image": "a.png", **given}) == (least, most)
    kept = {key: value for key, value in given.items() if value is not None}
    assert asked({"type": "image_url", "image_url": {**URL, **kept}}) == (least, most)
    assert asked({"type": "image_url", "image_url": {**URL, "detail": "low"}}) == AS_ENGINE


@pytest.mark.parametrize("value", [0, -1, 1.5, "784", True, [784], 1 << 70, float("nan")])
@pytest.mark.parametrize("name", LIMITS)
def test_what_is_no_number_of_pixels(name: str, value: object) -> None:
    with pytest.raises(PromptError, match=f"{name} of the image of message 0, part 0") as caught:
        asked({"type": "image_url", "image_url": {**URL, name: value}})
    assert "positive integer" in caught.value.expected
    assert asked({"type": "image", "image": "a.png", name: np.int64(784)}) != AS_ENGINE


def test_two_that_differ_and_sizes_are_refused() -> None:
    with pytest.raises(PromptError, match="no number of pixels") as caught:
        asked({"type": "image_url", "image_url": {**URL, "max_pixels": 1}, "max_pixels": 2})
    assert caught.value.found == "2 and 1"
    for name in ("resized_height", "resized_width"):
        with pytest.raises(PromptError, match="asks for a size") as caught:
            asked({"type": "image", "image": "a.png", name: 280})
        assert caught.value.found == f"{name} 280"


def test_an_engine_of_one_size_refuses_them() -> None:
    """Before any picture is opened, and its siblings go on."""
    part = {"type": "image", "image": "nowhere.png", "max_pixels": 784}
    prompt = [{"role": "user", "content": [part]}]
    with stand_in() as pipe:
        with pytest.raises(PromptError, match="no limits of pixels") as caught:
            pipe.render(prompt)
        assert "leave min_pixels and max_pixels out" in caught.value.fix
        refused, fine = pipe([prompt, ("look", png(1))], gen_config=plain(3))
        assert "no limits of pixels" in str(refused.error_message)
        assert fine.token_ids
