"""Private-use characters that mark places in a prompt's text until it is tokenised.

All characters differ, so that a part of a mark beside a mark cannot be mistaken for one.
"""

from __future__ import annotations

import re

from vlmforge.errors import PromptError

IMAGE = "\ue0f1\ue0f2\ue0f3"
"""Where an image goes; if the user spelled its name, followed by that and `NAMED`."""
TYPED = "\ue0f4\ue0f5\ue0f6"
"""The image placeholder, typed as ordinary text."""
OPEN, CLOSE = "\ue0f7\ue0f8\ue0f9", "\ue0fa\ue0fb\ue0fc"
"""Begin and end of the content of a message."""
NAMED = "\ue0fd\ue0fe\ue0ff"
SEAM = "\ue0ee\ue0ef\ue0f0"
"""Between two texts of a message that would make the image placeholder together."""


def refuse_marks(text: str) -> None:
    """PromptError for a text that has a mark."""
    for mark in (IMAGE, TYPED, OPEN, CLOSE, NAMED, SEAM):
        if mark in text:
            raise PromptError(
                "The prompt contains a private-use sequence that vlmforge uses inside.",
                found=ascii(mark),
                expected="text without it",
                fix="remove these characters",
            )


def as_written(text: str, placeholder: str) -> str:
    """What somebody wrote, of a text or of an error's words that have marks in them.

    `placeholder` is what the family writes for an image. Marks count as `repr` and JSON spell them
    too.
    """
    for mark, written in (
        (IMAGE, placeholder),
        (TYPED, placeholder),
        (OPEN, ""),
        (CLOSE, ""),
        (NAMED, ""),
        (SEAM, ""),
    ):
        text = text.replace(mark, written).replace(_in_writing(mark), written)
    return text


def first_content(text: str) -> str:
    """The text up to where a message's content begins or ends."""
    return re.split(f"{OPEN}|{CLOSE}", text, maxsplit=1)[0]


def _in_writing(mark: str) -> str:
    return mark.encode("unicode_escape").decode("ascii")
