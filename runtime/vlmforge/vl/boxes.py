"""Boxes that an answer spells out: from its text to pixels of the image.

A model trained to ground its words writes `<ref>the cat</ref><box>(10,20),(300,400)</box>`, on a
grid of 1000 x 1000 over the image. The text keeps this as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from msgspec import Struct

from vlmforge.errors import EngineFormatError

FORMATS = ("ref_box_1000",)
_GRID = 1000
_CORNER = r"\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)"
_BOX = re.compile(rf"<box>\s*{_CORNER}\s*,\s*{_CORNER}\s*</box>")
_REF, _REF_END = "<ref>", "</ref>"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of an answer, in pixels of the image as it was given (turned upright).

    Attributes:
        x1, y1: Left and top.
        x2, y2: Right and bottom, x1 <= x2 <= width and y1 <= y2 <= height.
        ref: The words that the box is for; None for a box without any.
        image: Which of the conversation's images, in order of all its messages, it lies on.
    """

    x1: int
    y1: int
    x2: int
    y2: int
    ref: str | None
    image: int


class Grounding(Struct, frozen=True):
    """What the boxes of an answer refer to.

    The words name no image. Boxes are taken to lie on the latest one, as originals draw them.

    Attributes:
        box_format: One of `FORMATS`.
        size: Width and height of the image in pixels.
        image: Its place among the conversation's images.
    """

    box_format: str
    size: tuple[int, int]
    image: int


def parse_boxes(text: str, grounding: Grounding) -> tuple[Box, ...]:
    """The boxes in an answer, in order.

    A box that follows its words, or another box of theirs, at once has them as `ref`. One that is
    not written well (not four whole numbers, off the grid, corners swapped) is none.

    Raises:
        EngineFormatError: a box format that this version does not know.
    """
    if grounding.box_format not in FORMATS:
        raise EngineFormatError(
            "The box format that the engine asks for is unknown to this version.",
            found=repr(grounding.box_format),
            expected="one of: " + ", ".join(FORMATS),
            fix="install a newer vlmforge, or build the engine again",
        )
    width, height = grounding.size
    boxes, end, ref = list[Box](), 0, None
    for found in _BOX.finditer(text):
        if found.start() != end or end == 0:
            ref = _ref_before(text[end : found.start()])
        end = found.end()
        x1, y1, x2, y2 = map(int, found.groups())
        if x1 <= x2 <= _GRID and y1 <= y2 <= _GRID:
            # The originals' own steps: exact arithmetic is a pixel off where this rounds down.
            left, right = int(x1 / _GRID * width), int(x2 / _GRID * width)
            top, bottom = int(y1 / _GRID * height), int(y2 / _GRID * height)
            boxes.append(Box(left, top, right, bottom, ref, grounding.image))
    return tuple(boxes)


def _ref_before(text: str) -> str | None:
    """The words of a `<ref>` that the text ends with."""
    if not text.endswith(_REF_END):
        return None
    start = text.rfind(_REF)
    words = text[start + len(_REF) : -len(_REF_END)]
    return words.strip() or None if start >= 0 and _REF_END not in words else None
