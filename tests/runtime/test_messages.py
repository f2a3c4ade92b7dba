"""Every call form of the interface, brought to one; and what is refused, in which words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from vlmforge.errors import PromptError
from vlmforge.inputs.messages import Conversation, Image, Message, Text, parse_prompt, parse_prompts

PIXELS = np.zeros((2, 3, 3), np.uint8)
PIL_IMAGE = PIL.Image.fromarray(PIXELS)


class ArrayOfALibrary(np.ndarray[Any, Any]):
    """As the readers of some imaging libraries return."""


def png() -> bytes:
    buffer = io.BytesIO()
    PIL_IMAGE.save(buffer, "png")
    return buffer.getvalue()


SOURCES = {
    "pil": PIL_IMAGE,
    "pil-file": PIL.Image.open(io.BytesIO(png())),
    "array": PIXELS,
    "array-subclass": PIXELS.view(ArrayOfALibrary),
    "path": Path("tiger.jpg"),
    "path-text": "tiger.jpg",
    "http": "http://host/tiger.jpg",
    "https": "https://host/tiger.jpg",
    "file-url": "file:///tmp/tiger.jpg",
    "data-url": "data:image/png;base64,AAAA",
    "bytes": b"\x89PNG",
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> object:
    return SOURCES[request.param]


def user(*blocks: Text | Image) -> Conversation:
    return Conversation((Message("user", blocks),))


def check(found: Conversation | PromptError, *blocks: str | object) -> None:
    """One user message of these blocks: texts as `Text`, the very same image objects."""
    assert isinstance(found, Conversation)
    (message,) = found.messages
    assert message.role == "user"
    assert [type(block) for block in message.blocks] == [type(block) for block in blocks]
    for block, expected in zip(message.blocks, blocks, strict=True):
        if isinstance(block, Image):
            assert isinstance(expected, Image)
            assert block.source is expected.source
        else:
            assert block == expected


def image(source: object) -> Image:
    return Image(source)  # type: ignore[arg-type]


def refusal(prompt: object) -> PromptError:
    with pytest.raises(PromptError) as caught:
        parse_prompts(prompt)
    return caught.value


# --- forms 1 to 4: one prompt ------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello", "", "https://host/a.jpg", "tiger.jpg"])
def test_a_string_is_text(text: str) -> None:
    prompts = parse_prompts(text)
    assert prompts.single
    assert prompts.items == (user(Text(text)),)


def test_of_text_and_image_the_image_goes_first(source: object) -> None:
    prompts = parse_prompts(("what is it?", source))
    assert prompts.single
    check(prompts.items[0], image(source), Text("what is it?"))


@pytest.mark.parametrize("group", [list, tuple])
def test_text_and_images_in_order(source: object, group: type) -> None:
    prompts = parse_prompts(("compare", group([source, PIL_IMAGE, source])))
    assert prompts.single
    check(prompts.items[0], image(source), image(PIL_IMAGE), image(source), Text("compare"))


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_other_kinds_of_bytes_are_bytes(kind: type) -> None:
    assert parse_prompt(("text", kind(b"\x89PNG"))).images == (Image(b"\x89PNG"),)


def test_no_images_is_text_alone() -> None:
    assert parse_prompts(("hello", [])).items == (user(Text("hello")),)


@pytest.mark.parametrize("key", [key for key in SOURCES if key != "path-text"])
def test_images_may_come_first(key: str) -> None:
    source = SOURCES[key]
    check(parse_prompt((source, "what is it?")), image(source), Text("what is it?"))
    images = ([source, "tiger.jpg"], "what are they?")
    check(parse_prompt(images), image(source), image("tiger.jpg"), Text("what are they?"))


def test_of_two_plain_strings_the_first_is_the_text() -> None:
    check(parse_prompt(("tiger.jpg", "lion.jpg")), image("lion.jpg"), Text("tiger.jpg"))
    address = "https://host/tiger.jpg"
    check(parse_prompt((address, address)), image(address), Text(address))


# --- forms 5 to 7: lists of prompts ------------------------------------------------------------


def test_a_list_is_a_list_even_of_one() -> None:
    for prompts, texts in ((["a", "b"], ("a", "b")), (["a"], ("a",)), ([], ())):
        parsed = parse_prompts(prompts)
        assert not parsed.single
        assert parsed.items == tuple(user(Text(text)) for text in texts)


def test_a_list_may_mix_forms(source: object) -> None:
    messages = [{"role": "user", "content": "c"}]
    asked = user(Text("e"))
    parsed = parse_prompts(["a", ("b", source), messages, ("d", [source, source]), asked])
    assert not parsed.single
    assert parsed.items[0] == user(Text("a"))
    check(parsed.items[1], image(source), Text("b"))
    assert parsed.items[2] == user(Text("c"))
    check(parsed.items[3], image(source), image(source), Text("d"))
    assert parsed.items[4] is asked


def test_a_bad_item_does_not_lose_its_siblings() -> None:
    parsed = parse_prompts(["a", 3, ("b", None), [{"role": "wizard", "content": "x"}], "c", None])
    assert not parsed.single
    kinds = [type(item) for item in parsed.items]
    assert kinds == [Conversation, *[PromptError] * 3, Conversation, PromptError]
    assert "int 3" in str(parsed.items[1])


# --- forms 8 and 9: OpenAI messages ------------------------------------------------------------


def test_messages_are_one_conversation() -> None:
    parsed = parse_prompts(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "q1", "name": "ignored"},
            {"role": "assistant", "content": [{"type": "text", "text": "a1"}]},
            {"role": "user", "content": ["q2", {"type": "text", "text": "q3"}]},
        ]
    )
    assert parsed.single
    assert parsed.items[0] == Conversation(
        (
            Message("system", (Text("Be brief."),)),
            Message("user", (Text("q1"),)),
            Message("assistant", (Text("a1"),)),
            Message("user", (Text("q2"), Text("q3"))),
        )
    )


def test_a_list_of_conversations_is_a_list() -> None:
    conversations = [[{"role": "user", "content": name}] for name in "ab"]
    parsed = parse_prompts(conversations)
    assert not parsed.single
    assert parsed.items == (user(Text("a")), user(Text("b")))
    assert not parse_prompts(conversations[:1]).single


PARTS: dict[str, Any] = {
    "image_url": lambda source: {"type": "image_url", "image_url": {"url": source}},
    "image_url-options": lambda source: {
        "type": "image_url",
        "image_url": {"url": source, "detail": "high", "max_dynamic_patch": 1},
    },
    "image_url-plain": lambda source: {"type": "image_url", "image_url": source},
    "image_data": lambda source: {"type": "image_data", "image_data": {"data": source}},
    "image_data-plain": lambda source: {"type": "image_data", "image_data": source},
    "image": lambda source: {"type": "image", "image": source},
    "image, by url": lambda source: {"type": "image", "url": source},
    "image, by path": lambda source: {"type": "image", "path": source},
    "image, one of its keys": lambda source: {
        "type": "image",
        "text": None,
        "image": None,
        "url": source,
        "path": None,
    },
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_keep_their_order(part: str, source: object) -> None:
    text = {"type": "text", "text": "between"}
    content = [PARTS[part](source), text, PARTS[part](PIL_IMAGE), "end"]
    found = parse_prompt([{"role": "user", "content": content}])
    check(found, image(source), Text("between"), image(PIL_IMAGE), Text("end"))


@pytest.mark.parametrize("head", ["", "data:;base64,", "DATA:image/png;base64,"])
def test_a_part_may_be_base64(head: str) -> None:
    part = {"type": "image", "base64": head + "aGVsbG8="}
    found = parse_prompt([{"role": "user", "content": [part]}])
    assert isinstance(found, Conversation)
    (block,) = found.images
    assert block.source == (head or "data:;base64,") + "aGVsbG8="


def test_the_images_of_a_conversation_are_those_of_its_messages_in_order() -> None:
    turns = [
        {"role": "user", "content": [PARTS["image"](b"1"), "x", PARTS["image"](b"2")]},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": (PARTS["image"](b"3"), "z")},
    ]
    conversation = parse_prompt(turns)
    assert [image.source for image in conversation.images] == [b"1", b"2", b"3"]
    assert [message.texts for message in conversation.messages] == [("x",), ("y",), ("z",)]
    assert [len(message.images) for message in conversation.messages] == [2, 0, 1]


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (None, "NoneType None"),
        (7, "int 7"),
        (b"text", "bytes b'text'"),
        ({"role": "user", "content": "q"}, "dict {'role': 'user', 'content': 'q'}"),
        (Path("tiger.jpg"), "PosixPath PosixPath('tiger.jpg')"),
    ],
)
def test_an_unknown_form_is_refused(prompt: object, found: str) -> None:
    error = refusal(prompt)
    assert error.summary == "A prompt is of a form that is not known."
    assert error.found == found
    assert "('text', image)" in error.expected
    assert error.fix.startswith("put the message" if isinstance(prompt, dict) else "put text first")


def test_what_is_shown_of_a_prompt_is_short() -> None:
    assert len(refusal({"role": "user", "content": "x" * 10_000}).found) < 120
    assert "\n" not in refusal(PIXELS).found
    assert refusal(tuple("abcdef")).found == "(str, str, str, str, ...) of length 6"


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ((), "() of length 0"),
        (("text",), "(str) of length 1"),
        (("text", PIL_IMAGE, PIL_IMAGE), "(str, Image, Image) of length 3"),
        ((PIL_IMAGE, PIL_IMAGE), "(Image, Image) of length 2"),
        ((["a.jpg"], ["b.jpg"]), "(list, list) of length 2"),
    ],
)
def test_a_tuple_of_another_shape_is_refused(prompt: object, found: str) -> None:
    error = refusal(prompt)
    assert error.summary == "A tuple prompt must be (text, image) or (text, [image, ...])."
    assert error.found == found
    assert error.expected == "two elements, one of them a string of text"


@pytest.mark.parametrize(
    "value", [None, 3, 1.5, {"url": "a.jpg"}, PIL.Image, [["a.jpg"]], object(), PIL_IMAGE.getbands]
)
def test_what_is_no_image_is_refused(value: object) -> None:
    error = refusal(("text", value))
    assert error.summary == "An image is of a type that is not known."
    assert error.expected == "a PIL image, a path, a URL, a data URI, bytes or a uint8 array"
    assert error.fix.startswith("from vlmforge.vl import load_image")


@pytest.mark.parametrize("role", [None, "User", "tool", "", 1, ["user"]])
def test_an_unknown_role_is_refused(role: object) -> None:
    good = {"role": "user", "content": "q"}
    error = refusal([good, {"role": role, "content": "q"}])
    assert error.summary == "Message 1 has a role that is not known."
    assert error.found == repr(role)
    assert error.expected == "'system' or 'user' or 'assistant'"


@pytest.mark.parametrize(
    "value", [np.array(["user", "text"]), "user" * 9999, 10**9999], ids=["array", "long", "number"]
)
def test_a_role_or_type_may_be_anything(value: object) -> None:
    for message in (
        {"role": value, "content": "q"},
        {"role": "user", "content": [{"type": value, "text": "q"}]},
    ):
        prompts = parse_prompts(["fine", [message]])
        error = prompts.items[1]
        assert isinstance(error, PromptError)
        assert "is not known" in error.summary
        assert len(str(error)) < 1000


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": 3}, {"content": PIL_IMAGE}])
def test_a_message_without_content_is_refused(message: dict[str, object]) -> None:
    error = refusal([{"role": "user", **message}])
    assert error.summary == "Message 0 has no usable content."
    assert "a string, or a list of" in error.expected


@pytest.mark.parametrize(
    "part",
    [
        3,
        None,
        {},
        {"type": "text"},
        {"type": "text", "text": 3},
        {"type": "image_url", "url": "a.jpg"},
        {"type": "audio_url", "audio_url": {"url": "a.mp3"}},
        {"type": "type"},
        {"type": None, "text": "a"},
        {"type": ["text"], "text": "a"},
    ],
)
def test_an_unknown_part_is_refused(part: object) -> None:
    error = refusal([{"role": "user", "content": ["fine", part]}])
    assert error.summary == "The content of message 0, part 1 is not known."
    assert "{'type': 'text', 'text': str}" in error.expected
    assert error.fix == "correct the type, or give the key that has the type's name"


@pytest.mark.parametrize("kind", ["video", "video_url", "input_video"])
def test_a_video_is_refused_with_what_to_send_instead(kind: str) -> None:
    error = refusal([{"role": "user", "content": ["fine", {"type": kind, kind: "a.mp4"}]}])
    assert error.summary == "The content of message 0, part 1 is a video; models see images only."
    assert error.found == f"a part of type '{kind}'"
    assert "frames as images" in error.fix


@pytest.mark.parametrize("payload", [{}, {"url": None}, None, 3, {"url": {"url": "a"}}])
def test_an_image_url_without_an_image_is_refused(payload: object) -> None:
    error = refusal([{"role": "user", "content": [{"type": "image_url", "image_url": payload}]}])
    assert error.summary == "An image is of a type that is not known."


@pytest.mark.parametrize(
    ("part", "summary", "found"),
    [
        ({}, "not there", "dict {'type': 'image'}"),
        ({"image": None}, "not there", "dict {'type': 'image', 'image': None}"),
        ({"image_url": "a.jpg"}, "not there", "'image_url': 'a.jpg'}"),
        ({"url": "a", "path": "b"}, "given more than once", "'url' and 'path'"),
        ({"image": b"a", "base64": "b"}, "given more than once", "'image' and 'base64'"),
    ],
)
def test_an_image_part_has_one_image(part: dict[str, object], summary: str, found: str) -> None:
    error = refusal([{"role": "user", "content": ["fine", {"type": "image", **part}]}])
    assert error.summary == f"The image of message 0, part 1 is {summary}."
    assert error.found.endswith(found)
    assert error.expected == "one of 'image', 'url', 'path', 'base64'"
    assert error.fix.startswith("{'type': 'image', 'url': 'https://...'}")


@pytest.mark.parametrize("payload", [b"aGVsbG8=", 3, ["aGVsbG8="]])
def test_base64_is_text(payload: object) -> None:
    error = refusal([{"role": "user", "content": [{"type": "image", "base64": payload}]}])
    assert error.summary == "The base64 of message 0, part 0 is not text."
    assert "'image': ..." in error.fix


@pytest.mark.parametrize("payload", [3, {"url": "a"}, ["a.jpg"]])
@pytest.mark.parametrize("key", ["image", "url", "path"])
def test_an_image_part_of_a_wrong_type(key: str, payload: object) -> None:
    error = refusal([{"role": "user", "content": [{"type": "image", key: payload}]}])
    assert error.summary == "An image is of a type that is not known."


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_send_images(role: str) -> None:
    error = refusal([{"role": role, "content": [PARTS["image"](PIL_IMAGE)]}])
    assert error.summary == "Message 0 has an image."
    assert error.found == f"an image in a message of role {role!r}"
    assert error.expected == "images in messages of role 'user' only"


def test_messages_beside_other_forms_are_single_bad_items() -> None:
    parsed = parse_prompts([{"role": "user", "content": "q"}, ("a", PIL_IMAGE)])
    assert not parsed.single
    assert [type(item) for item in parsed.items] == [PromptError, Conversation]
