"""Two traps of the originals, for every family: they cut the question away, or lose an image.

A prompt that does not fit the window is refused with its ledger, and so is a prompt whose images
and image tokens are not as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conftest import IMAGES, golden_engine
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from vlmforge.errors import ContextLengthError, PromptError
from vlmforge.vl.constants import IMAGE_TOKEN

PHOTO, TALL = str(IMAGES / "photo_640x480.png"), str(IMAGES / "tall_300x900.png")
SHORT = GenerationConfig(max_new_tokens=7)
# Golden checkpoint -> a window too small for three images, and tokens of PHOTO, TALL and PHOTO.
WINDOWS = {
    "llava_1_5_hf": (400, (144, 144, 144)),
    "llava_next_mistral_hf": (1400, (594, 612, 594)),
    "llava_v1_5_liuhaotian": (1300, (576, 576, 576)),
    "llava_v1_6_mistral_liuhaotian": (4096, (2340, 2376, 2340)),
    "yi_vl": (2400, (1024, 1024, 1024)),
}

Open = Callable[[str], Pipeline]


@pytest.fixture(scope="module")
def narrow(shared: Path) -> Iterator[Open]:
    """Pipelines by golden checkpoint whose window is that of `WINDOWS`."""
    opened: dict[str, Pipeline] = {}
    with ExitStack() as stack:

        def open_one(name: str) -> Pipeline:
            if name not in opened:
                window, _ = WINDOWS[name]
                config = EngineConfig(threads=1, session_len=window, max_batch_size=2)
                engine = golden_engine(shared, name)
                opened[name] = stack.enter_context(pipeline(engine, config))
            return opened[name]

        yield open_one


def refusal(pipe: Pipeline, prompt: object) -> ContextLengthError:
    with pytest.raises(ContextLengthError) as caught:
        pipe(prompt, gen_config=SHORT)
    return caught.value


@pytest.mark.parametrize("name", WINDOWS)
def test_images_that_do_not_fit(narrow: Open, name: str) -> None:
    pipe, (window, tokens) = narrow(name), WINDOWS[name]
    prompt = ("compare them", [PHOTO, TALL, PHOTO])
    rendered = pipe.render(prompt)
    assert tuple(span.length for span in rendered.image_spans) == tokens
    error = refusal(pipe, prompt)
    ledger = error.ledger
    assert (ledger.image, ledger.requested, ledger.window) == (sum(tokens), 7, window)
    assert ledger.text == rendered.text_tokens > 0
    assert str(ledger) in str(error)
    assert f"at most {window - 1} tokens" in str(error)
    assert "--session-len" in error.fix


@pytest.mark.parametrize("name", WINDOWS)
def test_text_that_does_not_fit_keeps_its_question(narrow: Open, name: str) -> None:
    pipe, (window, tokens) = narrow(name), WINDOWS[name]
    prompt = ("context " * window + "And what is the answer?", PHOTO)
    error = refusal(pipe, prompt)
    assert error.ledger.image == tokens[0]
    assert error.ledger.prompt == len(pipe.render(prompt).token_ids) >= window
    # Nothing was cut: the question is the prompt's end.
    assert "And what is the answer?" in pipe.render(prompt).text


@pytest.mark.parametrize("name", WINDOWS)
def test_the_last_token_that_fits_is_used(narrow: Open, name: str) -> None:
    """One token before the window is an answer of one token; at the window it is refused."""
    pipe, (window, _) = narrow(name), WINDOWS[name]

    def length(words: int) -> int:
        return len(pipe.render(f"hi {'1' * words}").token_ids)

    words = window - 1 - length(0)
    while length(words) < window - 1:
        words += 1
    while length(words) > window - 1:
        words -= 1
    assert length(words) == window - 1
    response = pipe(f"hi {'1' * words}", gen_config=SHORT)
    assert isinstance(response, Response)
    assert response.finish_reason in ("length", "stop")
    assert response.generate_token_len <= 1
    more = next(n for n in range(words, words + 9) if length(n) >= window)
    assert refusal(pipe, f"hi {'1' * more}").ledger.prompt == length(more)


@pytest.mark.parametrize("name", WINDOWS)
def test_in_a_list_the_others_are_answered(narrow: Open, name: str) -> None:
    prompts: list[Any] = ["hi", ("compare", [PHOTO] * 3), ("what?", PHOTO)]
    answers = narrow(name)(prompts, gen_config=SHORT)
    assert isinstance(answers, list)
    assert [answer.finish_reason == "error" for answer in answers] == [False, True, False]
    assert answers[1].error_code == "context_length_exceeded"
    assert "image)" in str(answers[1].error_message)


MISMATCHES = {
    "fewer than images": (f"{IMAGE_TOKEN} compare", [PHOTO, TALL], 1, "2 images"),
    "more than images": (f"{IMAGE_TOKEN} or {IMAGE_TOKEN}?", [PHOTO], 2, "1 image"),
    "none for it": (f"{IMAGE_TOKEN}?", [], 1, "0 images"),
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("case", MISMATCHES)
def test_image_tokens_and_images_that_do_not_match(narrow: Open, name: str, case: str) -> None:
    text, images, tokens, found = MISMATCHES[case]
    with pytest.raises(PromptError) as caught:
        narrow(name)((text, images), gen_config=SHORT)
    assert caught.value.found == f"{tokens} x {IMAGE_TOKEN} and {found}"
    assert "once for each image" in caught.value.fix


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(("places", "images"), [(1, 2), (2, 1), (0, 1)])
def test_a_verbatim_prompt_must_match_too(
    narrow: Open, name: str, places: int, images: int
) -> None:
    pipe = narrow(name)
    placeholder = pipe._engine.manifest.prompt.image_placeholder
    prompt = (f"{placeholder}\n" * places + "what?", [PHOTO] * images)
    with pytest.raises(PromptError) as caught:
        pipe(prompt, gen_config=SHORT, do_preprocess=False)
    assert caught.value.found.startswith(f"{places} x {IMAGE_TOKEN} and {images} image")
