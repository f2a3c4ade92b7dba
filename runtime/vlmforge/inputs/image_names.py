"""What images are called in prompts that spell their names out.

The name is only read by the tokenizer: the features of the image take the places of its ids, and
the prefix cache knows an image by its pixels. It still decides the prompt's text and ids.
"""

from __future__ import annotations

import os

import PIL.Image

from vlmforge.engine.prompts import NamedSpan, PromptPolicy
from vlmforge.errors import PromptError
from vlmforge.inputs.image_marks import first_content
from vlmforge.inputs.messages import Image, is_image_address


def given_name(image: Image) -> str | None:
    """The path or URL that an image was given by or opened from; None: it has no name."""
    if image.name is not None:
        return image.name
    source = image.source
    if isinstance(source, PIL.Image.Image):
        source = getattr(source, "filename", "")  # as `PIL.Image.open` and `load_image` set it
    if isinstance(source, str):
        return None if not source or source[:5].lower() == "data:" else source
    return os.fspath(source) if isinstance(source, os.PathLike) else None


def spelled_name(policy: PromptPolicy, image: Image, typed: str | None) -> str:
    """The name in the prompt: what the user typed there, the path or URL, or the stand-in.

    The stand-in is for images without a name, for names that cannot be written, and for URLs that
    are too long: nobody chooses their length. "" where the policy spells no names.

    Raises:
        PromptError: a path, or what the user typed, is too long.
    """
    spelling = policy.splice
    if not isinstance(spelling, NamedSpan):
        return ""
    name = typed or given_name(image)
    if not name or spelling.end in name:
        return spelling.stand_in
    try:
        length = len(spelling.name_bytes(name))
    except UnicodeEncodeError:  # a file's name that is no text
        return spelling.stand_in
    if length <= spelling.max_name_bytes:
        return name
    if not typed and is_image_address(name):
        return spelling.stand_in
    raise _too_long(name, length, spelling)


def name_ids(name: str, length: int, policy: PromptPolicy) -> list[int]:
    """What stands at the positions of an image: its name's bytes, padded to `length` ids."""
    spelled = policy.splice.name_ids(name)
    return spelled + [policy.image_token_id] * (length - len(spelled))


def refuse_spelled(text: str, policy: PromptPolicy) -> None:
    """PromptError for a text without images that spells one, or begins to."""
    spelling = policy.splice
    if not isinstance(spelling, NamedSpan) or spelling.begin not in text:
        return
    written = first_content(text[text.index(spelling.begin) :])
    closed = spelling.end in written
    raise PromptError(
        "The prompt spells an image that was not given."
        if closed
        else "The prompt begins an image and does not end it.",
        found=repr(written[:60]),
        expected=f"{spelling.begin}path{spelling.end} once for each image that is given",
        fix="pass the image: pipe((text, image)); prompts do not open files"
        if closed
        else f"put {spelling.end} behind the image's path, or remove {spelling.begin}",
    )


def _too_long(name: str, length: int, spelling: NamedSpan) -> PromptError:
    return PromptError(
        "The name of an image is too long for this model's prompts.",
        found=f"{length} bytes: {name[:40]!r}...",
        expected=f"at most {spelling.max_name_bytes} bytes of UTF-8",
        fix="move the file to a shorter path, or pass the image without its name: its bytes",
    )
