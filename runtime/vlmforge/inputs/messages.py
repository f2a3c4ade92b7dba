"""Every form that a prompt may take, brought to one: a conversation of messages of blocks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.engine.images.pixels import AS_ENGINE, PixelRange
from vlmforge.errors import PromptError
from vlmforge.field_rules import shown
from vlmforge.inputs.pixel_range import pixel_range
from vlmforge.vl.load import OpenedImage

ImageSource: TypeAlias = (
    PIL.Image.Image | NDArray[Any] | os.PathLike[str] | bytes | str | OpenedImage
)
ROLES = ("system", "user", "assistant")
_ADDRESS = re.compile(r"(https?|file)://|data:(image|[^,\s]*;base64,)", re.IGNORECASE)
_IMAGE_KEYS = ("image", "url", "path", "base64")
_FORMS = (
    "'text', ('text', image), ('text', [image, ...]), a list or iterator of these, OpenAI messages "
    "[{'role': ..., 'content': ...}, ...], or a list of such conversations"
)


@dataclass(frozen=True, slots=True)
class Text:
    """A block of text."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A block that is an image: anything that `load_image` takes, or an image that is open.

    `name` is the path or URL that it was loaded from, where `source` is that no more; `pixels` what
    it is to be brought to, where `source` does not say so itself.
    """

    source: ImageSource
    name: str | None = None
    pixels: PixelRange = AS_ENGINE

    @property
    def pixel_range(self) -> PixelRange:
        """The least and the most pixels that it is to be brought to."""
        own = self.pixels == AS_ENGINE and isinstance(self.source, OpenedImage)
        return self.source.pixel_range if own else self.pixels  # type: ignore[union-attr]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    blocks: tuple[Text | Image, ...]

    @property
    def images(self) -> tuple[Image, ...]:
        """Its images in order."""
        return tuple([block for block in self.blocks if isinstance(block, Image)])

    @property
    def texts(self) -> tuple[str, ...]:
        """Its texts in order."""
        return tuple([block.text for block in self.blocks if isinstance(block, Text)])


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order. The images of all messages, in order, are its images."""

    messages: tuple[Message, ...]

    @property
    def images(self) -> tuple[Image, ...]:
        """All images in order."""
        return tuple(
            [b for message in self.messages for b in message.blocks if isinstance(b, Image)]
        )


class Prompts(Struct, frozen=True):
    """A call's prompts; `single` when the caller wants one response and not a list.

    An item that is of no known form is kept as its error, so that its siblings go on. Of an
    iterator, `items` is one too: its prompts are taken as they are needed.
    """

    items: Iterable[Conversation | PromptError]
    single: bool

    @property
    def count(self) -> int | None:
        """How many there are; None: an iterator does not tell."""
        return len(self.items) if isinstance(self.items, tuple) else None


def parse_prompts(prompts: object) -> Prompts:
    """Bring the argument of `pipe(...)` to conversations.

    Raises:
        PromptError: a single prompt of an unknown form.
    """
    if isinstance(prompts, list) and not _is_messages(prompts):
        return Prompts(tuple(_item(prompt) for prompt in prompts), single=False)
    if isinstance(prompts, Iterator):
        return Prompts(map(_item, prompts), single=False)
    return Prompts((parse_prompt(prompts),), single=True)


def _item(prompt: object) -> Conversation | PromptError:
    try:
        return parse_prompt(prompt)
    except PromptError as error:
        return error


def parse_prompt(prompt: object) -> Conversation:
    """Bring one prompt to a conversation (PromptError otherwise)."""
    if isinstance(prompt, Conversation):
        return prompt
    if isinstance(prompt, str):
        return Conversation((Message("user", (Text(prompt),)),))
    if isinstance(prompt, tuple):
        return Conversation((Message("user", _tuple_blocks(prompt)),))
    if isinstance(prompt, list) and _is_messages(prompt):
        return Conversation(tuple(_message(message, i) for i, message in enumerate(prompt)))
    raise PromptError(
        "A prompt is of a form that is not known.",
        found=_describe(prompt),
        expected=_FORMS,
        fix="put the message into a list: pipe([message])"
        if isinstance(prompt, Mapping)
        else "put text first and images second: pipe(('describe this image', image))",
    )


def _is_messages(prompt: Sequence[object]) -> bool:
    return bool(prompt) and all(isinstance(item, Mapping) for item in prompt)


def is_image_address(value: object) -> bool:
    """Whether a string can only mean an image: a URL or a data URI."""
    return isinstance(value, str) and _ADDRESS.match(value) is not None


def _tuple_blocks(prompt: tuple[object, ...]) -> tuple[Text | Image, ...]:
    if len(prompt) == 2:
        first, second = prompt
        if isinstance(first, str) and not (is_image_address(first) and _is_text(second)):
            return (*_images(second), Text(first))  # images go before the text
        if isinstance(second, str):
            return (*_images(first), Text(second))
    raise PromptError(
        "A tuple prompt must be (text, image) or (text, [image, ...]).",
        found=_describe(prompt),
        expected="two elements, one of them a string of text",
        fix="pipe(('describe these images', [image1, image2]))",
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not is_image_address(value)


def _images(value: object) -> tuple[Image, ...]:
    sources = value if isinstance(value, list | tuple) else [value]
    return tuple(Image(_source(source)) for source in sources)


def _source(value: object) -> ImageSource:
    if isinstance(value, PIL.Image.Image | np.ndarray | os.PathLike | bytes | str | OpenedImage):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    raise PromptError(
        "An image is of a type that is not known.",
        found=_describe(value),
        expected="a PIL image, a path, a URL, a data URI, bytes or a uint8 array",
        fix="from vlmforge.vl import load_image; image = load_image(path_or_url)",
    )


def _message(message: Mapping[str, object], index: int) -> Message:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(
            f"Message {index} has a role that is not known.",
            found=shown(role),
            expected=" or ".join(repr(name) for name in ROLES),
            fix="{'role': 'user', 'content': 'describe this image'}",
        )
    if isinstance(content, str):
        blocks: tuple[Text | Image, ...] = (Text(content),)
    elif isinstance(content, list | tuple):
        blocks = tuple(_block(item, f"message {index}, part {i}") for i, item in enumerate(content))
    else:
        raise PromptError(
            f"Message {index} has no usable content.",
            found=_describe(content),
            expected="a string, or a list of "
            "{'type': 'text' | 'image_url' | 'image_data' | 'image', ...}",
            fix="{'role': 'user', 'content': [{'type': 'text', 'text': 'hello'}]}",
        )
    if role != "user" and any(isinstance(block, Image) for block in blocks):
        raise PromptError(
            f"Message {index} has an image.",
            found=f"an image in a message of role {role!r}",
            expected="images in messages of role 'user' only",
            fix="move the image to a user message",
        )
    return Message(role, blocks)


def _block(item: object, where: str) -> Text | Image:
    if isinstance(item, str):
        return Text(item)
    kind = item.get("type") if isinstance(item, Mapping) else None
    if isinstance(item, Mapping) and isinstance(kind, str) and kind == "image":
        return Image(_source(_image_part(item, where)), pixels=pixel_range(where, item))
    if isinstance(item, Mapping) and isinstance(kind, str) and kind in item:
        payload = item[kind]
        match kind:
            case "text" if isinstance(payload, str):
                return Text(payload)
            case "image_url" | "image_data":
                source = _source(_unwrap(payload, kind.removeprefix("image_")))
                return Image(source, pixels=pixel_range(where, item, payload))
    if isinstance(kind, str) and "video" in kind:
        raise PromptError(
            f"The content of {where} is a video; models see images only.",
            found=f"a part of type {kind!r}",
            expected="text and images",
            fix="send some of its frames as images: [{'type': 'image', 'image': frame}, ...]",
        )
    raise PromptError(
        f"The content of {where} is not known.",
        found=_describe(item),
        expected="{'type': 'text', 'text': str}, {'type': 'image_url', 'image_url': {'url': str}}, "
        "{'type': 'image_data', 'image_data': {'data': image}} or {'type': 'image', KEY: image} "
        f"with a KEY of {', '.join(_IMAGE_KEYS)}",
        fix="correct the type, or give the key that has the type's name",
    )


def _image_part(part: Mapping[str, object], where: str) -> object:
    """The image of a part in the form of transformers' chat templates."""
    given = [key for key in _IMAGE_KEYS if part.get(key) is not None]
    if len(given) != 1:
        raise PromptError(
            f"The image of {where} is {'given more than once' if given else 'not there'}.",
            found=" and ".join(map(repr, given)) or _describe(part),
            expected=f"one of {', '.join(map(repr, _IMAGE_KEYS))}",
            fix="{'type': 'image', 'url': 'https://...'}: images are given where they stand",
        )
    value = part[given[0]]
    if given == ["base64"]:
        return _as_data_url(value, where)
    return value


def _as_data_url(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise PromptError(
            f"The base64 of {where} is not text.",
            found=_describe(value),
            expected="a string of base64 digits",
            fix="base64.b64encode(data).decode(); or give bytes by {'type': 'image', 'image': ...}",
        )
    return value if value[:5].lower() == "data:" else f"data:;base64,{value}"


def _unwrap(payload: object, key: str) -> object:
    return payload.get(key) if isinstance(payload, Mapping) else payload


def _describe(value: object) -> str:
    if isinstance(value, tuple | list):
        inside = ", ".join(type(item).__name__ for item in value[:4])
        more = ", ..." if len(value) > 4 else ""
        brackets = "()" if isinstance(value, tuple) else "[]"
        return f"{brackets[0]}{inside}{more}{brackets[1]} of length {len(value)}"
    text = " ".join(shown(value).split())
    return f"{type(value).__name__} {text[:80]}{'...' if len(text) > 80 else ''}"
