"""What of a prompt is text: typed placeholders, verbatim prompts, marks; and any conversation."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from tokenizers import Tokenizer

from prompt_setups import (
    HF_JSON,
    MARK,
    PHOTO,
    TYPED,
    Setup,
    assistant,
    hf_setup,
    original_setup,
    plain_ids,
    user,
)
from vlmforge.inputs.messages import Image, Message, Text
from vlmforge.inputs.render import marked_tokenizer_json
from vlmforge.inputs.template_choice import ActiveTemplate
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.vl.constants import IMAGE_TOKEN


@pytest.fixture(params=["hf", "original"])
def setup(request: pytest.FixtureRequest) -> Setup:
    return {"hf": hf_setup, "original": original_setup}[request.param]()


# --- the placeholder as ordinary text ----------------------------------------------------------

TYPED_PROMPTS = [
    ("what does <image> mean?",),
    ("<image>",),
    ("<image><image>", PHOTO),
    (PHOTO, PHOTO, "<image>"),
    (f"<image> {IMAGE_TOKEN} <image>", PHOTO),
    (f"{IMAGE_TOKEN}<image>", PHOTO),
    ("<ima<image>ge>",),
]


@pytest.mark.parametrize("blocks", TYPED_PROMPTS, ids=str)
def test_a_typed_placeholder_is_text(setup: Setup, blocks: tuple[str | Image, ...]) -> None:
    rendered = setup.render(user(*blocks), length=3)
    images = sum(isinstance(block, Image) for block in blocks)
    typed = sum(block.count("<image>") for block in blocks if isinstance(block, str))
    assert len(rendered.image_spans) == images
    assert rendered.token_ids.count(setup.policy.image_token_id) == 3 * images
    assert rendered.text.count("<image>") == typed + images


IN_ORDER = ActiveTemplate(
    "in order",
    "{% for m in messages %}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}",
    (),
    in_order=True,
)


@pytest.mark.parametrize(
    "blocks",
    [
        (PHOTO, "say <ima", "ge>"),
        ("<im", "a", "", "ge> and <ima", "ge", ">", PHOTO, "!"),
        ("<ima", PHOTO, "ge>"),
        (PHOTO, *("<ima", "ge>") * 1500),
    ],
    ids=[*"abc", "many"],
)
def test_texts_that_make_a_placeholder_together_are_text(blocks: tuple[str | Image, ...]) -> None:
    joined = structs.replace(original_setup().policy, text_separator="")
    for used in (
        dataclasses.replace(hf_setup(), template=IN_ORDER),
        dataclasses.replace(original_setup(), policy=joined),
    ):
        rendered = used.render(user(*blocks), length=3)
        assert [span.length for span in rendered.image_spans] == [3]
        assert rendered.token_ids.count(used.policy.image_token_id) == 3
        written = "".join(b if isinstance(b, str) else "<image>" for b in blocks)
        assert written in rendered.text


def test_a_typed_placeholder_has_the_ids_of_its_letters() -> None:
    setup = hf_setup()
    for message in (user("what does <image> mean?"), assistant("<image>"), user("<image>")):
        rendered = setup.render(user("hello"), message)
        assert list(rendered.token_ids) == plain_ids(rendered.text, setup.policy)


def test_a_typed_placeholder_in_a_system_or_assistant_message_is_text(setup: Setup) -> None:
    system = Message("system", (Text("never say <image>"),))
    rendered = setup.render(system, user("q", PHOTO), assistant("<image>?"), user("r"), length=2)
    assert len(rendered.image_spans) == 1
    assert "never say <image>" in rendered.text
    assert "<image>?" in rendered.text
    assert rendered.token_ids.count(setup.policy.image_token_id) == 2


# --- prompts given verbatim --------------------------------------------------------------------


def test_without_preprocessing_the_text_is_the_prompt(setup: Setup) -> None:
    rendered = setup.render(user("hello <image> there"), preprocess=False)
    assert rendered.text == "hello <image> there"
    assert rendered.image_spans == ()
    encoded = setup.encoder.encode("hello <image> there")
    assert list(rendered.token_ids) == [1, *encoded]


@pytest.mark.parametrize("token", [IMAGE_TOKEN, "<image>"])
def test_without_preprocessing_images_go_where_the_text_says(setup: Setup, token: str) -> None:
    rendered = setup.render(user(f"a {token} b", PHOTO), preprocess=False)
    assert rendered.text == "a <image> b"
    assert len(rendered.image_spans) == 1


def test_a_verbatim_template_does_the_same(setup: Setup) -> None:
    verbatim = dataclasses.replace(setup, template=ActiveTemplate("base", "no {{", (), True))
    prompt = user(f"a {IMAGE_TOKEN} b", PHOTO)
    assert verbatim.render(prompt) == setup.render(prompt, preprocess=False)


@pytest.mark.parametrize("text", ["no place", f"{IMAGE_TOKEN} <image>"])
def test_without_preprocessing_a_place_for_each_image_is_needed(setup: Setup, text: str) -> None:
    error = setup.refusal(user(text, PHOTO), preprocess=False)
    places = 2 * (text != "no place")
    assert error.summary == "The prompt does not have one image token for each image."
    assert error.found == f"{places} x <IMAGE_TOKEN> and 1 image"
    # Here nothing puts the images first, so leaving the tokens out is no way out.
    assert error.expected == "1 x <IMAGE_TOKEN>"
    assert error.fix == "put <IMAGE_TOKEN> into the text once for each image"


# --- the beginning of the sequence, and our marks ----------------------------------------------


def test_there_is_one_token_at_the_beginning(setup: Setup) -> None:
    assert setup.render(user("q")).token_ids[:2].count(1) == 1
    typed = setup.render(user("<s>q"), preprocess=False)
    assert typed.token_ids.count(1) == 1
    without = dataclasses.replace(setup, policy=structs.replace(setup.policy, bos_id=None))
    assert without.render(user("q")).token_ids == setup.render(user("q")).token_ids[1:]


@pytest.mark.parametrize("preprocess", [True, False])
@pytest.mark.parametrize("mark", [MARK, TYPED])
def test_text_with_our_marks_is_refused(setup: Setup, mark: str, preprocess: bool) -> None:
    for blocks in (
        (f"a{mark}b",),
        (f"<image>{mark}", PHOTO),
        (f"{IMAGE_TOKEN}{mark}", PHOTO),
        (mark, PHOTO, "b"),
    ):
        error = setup.refusal(user(*blocks), preprocess=preprocess)
        assert "private-use sequence" in error.summary
        assert error.found == ascii(mark)
        assert error.fix == "remove these characters"


def pieces_of_marks() -> list[str]:
    parts = [mark[a:b] for mark in (MARK, TYPED) for a in range(3) for b in range(a + 1, 4)]
    return [part for part in parts if len(part) < 3]


# The content of the first message, in jinja.
_CONTENT = "messages[0].content[0].text"


@pytest.mark.parametrize("borders", [None, ("<s>",)])
@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("raise_exception('no: ' + CONTENT)", "TemplateError: no: a <image> b <image>"),
        ("raise_exception(CONTENT | tojson(ensure_ascii=True))", "a <image> b <image>"),
        ("{}[CONTENT].x", "no attribute 'a <image> b <image>'"),
    ],
)
def test_an_error_of_a_template_shows_what_was_written(
    expression: str, found: str, borders: tuple[str, ...] | None
) -> None:
    setup, expression = hf_setup(), expression.replace("CONTENT", _CONTENT)
    setup = dataclasses.replace(
        setup,
        policy=structs.replace(setup.policy, content_tokens=borders),
        template=ActiveTemplate("quoting", f"{{{{ {expression} }}}}", ()),
    )
    # One placeholder is typed and one is the image's place.
    error = setup.refusal(user(f"a <image> b {IMAGE_TOKEN}", PHOTO))
    assert found in error.found
    assert not re.search(r"[\ue000-\uf8ff]|\\u", str(error))


@pytest.mark.parametrize("piece", pieces_of_marks(), ids=ascii)
def test_a_part_of_a_mark_beside_an_image_stays_where_it_is(setup: Setup, piece: str) -> None:
    rendered = setup.render(user(f"{piece}{IMAGE_TOKEN}{piece}<image>{piece}", PHOTO))
    assert f"USER: {piece}<image>{piece}<image>{piece} ASSISTANT:" in rendered.text
    assert len(rendered.image_spans) == 1


def test_only_the_placeholder_changes_in_the_marked_tokenizer() -> None:
    policy = hf_setup().policy
    before, after = json.loads(HF_JSON), json.loads(marked_tokenizer_json(HF_JSON, policy))
    for token in before["added_tokens"]:
        if token["content"] == "<image>":
            token["content"] = MARK
    assert after == before
    assert marked_tokenizer_json(HF_JSON, original_setup().policy) == HF_JSON


def test_a_placeholder_in_the_vocabulary_is_marked_there_too() -> None:
    data = json.loads(HF_JSON)
    data["model"]["vocab"]["<image>"] = 640
    marked = marked_tokenizer_json(json.dumps(data), hf_setup().policy)
    assert json.loads(marked)["model"]["vocab"][MARK] == 640
    encoder = TextTokenizer(marked)
    assert encoder.encode(MARK) == [640]
    assert 640 not in encoder.encode("<image>")


# --- any conversation --------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("ab. \n?é图😀"), max_size=8)
QUESTIONS = st.lists(WORDS | st.just(PHOTO), min_size=1, max_size=4).map(lambda b: user(*b))


@st.composite
def dialogues(draw: st.DrawFn) -> list[Message]:
    questions = draw(st.lists(QUESTIONS, min_size=1, max_size=3))
    turns: list[Message] = []
    for question in questions:
        turns += [question, assistant(draw(WORDS))]
    return turns[: len(turns) - draw(st.integers(0, 1))]


@given(dialogues())
def test_ids_are_those_of_the_published_tokenizer_for_the_rendered_text(
    turns: Sequence[Message],
) -> None:
    rendered = hf_setup().render(*turns, length=2)
    once = published_tokenizer().encode(rendered.text).ids
    expanded = [i for token in once for i in [token] * (2 if token == 640 else 1)]
    assert list(rendered.token_ids) == expanded


@cache
def published_tokenizer() -> Tokenizer:
    return Tokenizer.from_str(HF_JSON)


@given(dialogues())
def test_ids_are_those_of_the_chunks_between_the_images(turns: Sequence[Message]) -> None:
    setup = original_setup()
    rendered = setup.render(*turns, length=2)
    first, *rest = (setup.encoder.encode(chunk) for chunk in rendered.text.split("<image>"))
    expected = [1, *first]
    for chunk in rest:
        expected += [-200, -200, *chunk]
    assert list(rendered.token_ids) == expected


@pytest.mark.parametrize("make", [hf_setup, original_setup])
@given(turns=dialogues(), more=QUESTIONS)
def test_what_precedes_an_image_does_not_change_with_later_turns(
    make: Any, turns: list[Message], more: Message
) -> None:
    """So that the cache of an earlier turn is found again: exact up to the last image."""
    setup: Setup = make()
    before = setup.render(*turns)
    after = setup.render(*turns, *([assistant("a")] if turns[-1].role == "user" else []), more)
    assert after.image_spans[: len(before.image_spans)] == before.image_spans
    if before.image_spans:
        end = before.image_spans[-1].start + before.image_spans[-1].length
        assert after.token_ids[:end] == before.token_ids[:end]


def test_a_closed_turn_is_a_prefix_of_every_longer_conversation() -> None:
    turns = [user(PHOTO, "What is this?"), assistant("A flower.")]
    short, long = (original_setup().render(*t) for t in (turns, [*turns, user("Which colour?")]))
    assert long.text.startswith(short.text + "</s>")
    assert long.token_ids[: len(short.token_ids)] == short.token_ids


def test_a_question_is_a_prefix_of_its_answered_conversation(setup: Setup) -> None:
    question = user(PHOTO, "What is this?")
    asked, answered = setup.render(question), setup.render(question, assistant("A flower."))
    assert answered.token_ids[: len(asked.token_ids)] == asked.token_ids
