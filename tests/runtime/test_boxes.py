"""Boxes in an answer: parsed to pixels, drawn, and left alone where they are not well written."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from vlmforge import Box, Response
from vlmforge.errors import EngineFormatError
from vlmforge.vl import draw_boxes
from vlmforge.vl.boxes import FORMATS, Grounding, parse_boxes

SIZE = (640, 480)
GROUNDING = Grounding(FORMATS[0], SIZE, 2)


def parsed(text: str, size: tuple[int, int] = SIZE) -> list[tuple[str | None, tuple[int, ...]]]:
    boxes = parse_boxes(text, Grounding(FORMATS[0], size, 0))
    return [(box.ref, (box.x1, box.y1, box.x2, box.y2)) for box in boxes]


ONE = "<box>(100,200),(300,400)</box>"
PLACE = (64, 96, 192, 192)
EXAMPLES = {
    "alone": (ONE, [(None, PLACE)]),
    "with words": (f"A <ref> the cat </ref>{ONE}.", [("the cat", PLACE)]),
    "chinese": (f"<ref>猫</ref>{ONE}", [("猫", PLACE)]),
    "two of the same words": (f"<ref>cats</ref>{ONE}{ONE}", [("cats", PLACE)] * 2),
    "words apart": (f"<ref>cats</ref> at {ONE}", [(None, PLACE)]),
    "each its own": (f"<ref>a</ref>{ONE}, <ref>b</ref>{ONE}", [("a", PLACE), ("b", PLACE)]),
    "after others": (f"<ref>a</ref>{ONE} and {ONE}", [("a", PLACE), (None, PLACE)]),
    "spaces": ("<box> ( 100 , 200 ) , ( 300,400) </box>", [(None, PLACE)]),
    "whole image": ("<box>(0,0),(1000,1000)</box>", [(None, (0, 0, 640, 480))]),
    "a point": ("<box>(5,5),(5,5)</box>", [(None, (3, 2, 3, 2))]),
    "words not closed": (f"<ref>a {ONE}", [(None, PLACE)]),
    "words not opened": (f"a</ref>{ONE}", [(None, PLACE)]),
    "closed twice": (f"<ref>a</ref></ref>{ONE}", [(None, PLACE)]),
    "opened twice": (f"<ref>a<ref>b</ref>{ONE}", [("b", PLACE)]),
    "no words": (f"<ref> </ref>{ONE}", [(None, PLACE)]),
    "a bad one between": (f"<ref>a</ref><box>(1,2)</box>{ONE}", [(None, PLACE)]),
}
MALFORMED = (
    "<box>(1,2),(3,4)",
    "(1,2),(3,4)</box>",
    "<box>(1,2),(3)</box>",
    "<box>(1,2),(3,4),(5,6)</box>",
    "<box>(a,2),(3,4)</box>",
    "<box>(-1,2),(3,4)</box>",
    "<box>(1.5,2),(3,4)</box>",
    "<box>(1,2),(3,1001)</box>",
    "<box>(9,2),(3,4)</box>",
    "<box>(1,9),(3,4)</box>",
    "<box>(1,2),(3,99999999999)</box>",
    "<box>(١,٢),(٣,٤)</box>",
    "<quad>(1,2),(3,4),(5,6),(7,8)</quad>",
    "<box></box>",
    "",
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    text, expected = EXAMPLES[name]
    assert parsed(text) == expected


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_not_well_written_is_no_box(text: str) -> None:
    assert parsed(text) == []
    # It hides no box beside it.
    assert parsed(f"{text} {ONE}") == [(None, PLACE)]


def test_each_box_names_its_image() -> None:
    (box,) = parse_boxes(f"<ref>cat</ref>{ONE}", GROUNDING)
    assert box == Box(*PLACE, "cat", 2)
    with pytest.raises(AttributeError):
        box.x1 = 3  # type: ignore[misc]


def test_an_unknown_format() -> None:
    with pytest.raises(EngineFormatError) as caught:
        parse_boxes(ONE, Grounding("xyz", SIZE, 0))
    assert caught.value.found == "'xyz'"
    assert FORMATS[0] in caught.value.expected


corners = st.tuples(*[st.integers(0, 1000)] * 4)
words = st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=1, max_size=12)


@given(
    st.lists(st.tuples(st.none() | words, corners, words), max_size=6),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
@settings(max_examples=200)
def test_written_boxes_are_read(
    written: list[tuple[str | None, tuple[int, ...], str]], size: tuple[int, int]
) -> None:
    text, expected = "", []
    for ref, (a, b, c, d), after in written:
        x1, x2, y1, y2 = *sorted((a, c)), *sorted((b, d))
        text += f"<ref>{ref}</ref>" if ref is not None else ""
        text += f"<box>({x1},{y1}),({x2},{y2})</box>{after}"
        place = [int(p / 1000 * size[i % 2]) for i, p in enumerate((x1, y1, x2, y2))]
        expected.append(((ref or "").strip() or None, tuple(place)))
    assert parsed(text, size) == expected


@given(st.lists(st.sampled_from(["<box>", "</box>", "<ref>", "</ref>", ONE, "(1,2)", ",", "a"])))
@settings(max_examples=200)
def test_any_text_is_read(pieces: list[str]) -> None:
    """As many boxes as are whole, each inside the image."""
    text = "".join(pieces)
    whole = re.findall(r"<box>\(\d+,\d+\),\(\d+,\d+\)</box>", text)
    boxes = parse_boxes(text, GROUNDING)
    assert len(boxes) == len(whole)
    assert all(0 <= b.x1 <= b.x2 <= 640 and 0 <= b.y1 <= b.y2 <= 480 for b in boxes)


def test_a_stream_has_them_on_its_last_piece() -> None:
    boxes = (Box(1, 2, 3, 4, None, 0),)
    whole = Response("a").extend(Response("b", boxes=boxes)).extend(Response("c"))
    assert (whole.text, whole.boxes) == ("abc", boxes)
    assert Response().boxes == ()


# --- drawing -----------------------------------------------------------------------------------

GREY = (90, 90, 90)


def changed(image: Image.Image) -> set[tuple[int, int]]:
    """Places (x, y) that are not grey."""
    rows, columns = np.nonzero((np.asarray(image) != GREY).any(-1))
    return set(zip(columns.tolist(), rows.tolist(), strict=True))


def test_the_outline_is_drawn_and_the_image_left_alone() -> None:
    image = Image.new("RGB", (100, 80), GREY)
    drawn = draw_boxes(image, [Box(20, 30, 60, 70, None, 0)])
    assert (drawn.mode, drawn.size) == ("RGB", (100, 80))
    assert changed(image) == set()
    places = changed(drawn)
    assert {(20, 30), (60, 70), (20, 70), (60, 30), (40, 30), (20, 50)} <= places
    assert (40, 50) not in places
    assert all(20 <= x <= 60 and 30 <= y <= 70 for x, y in places)
    assert draw_boxes(image, []).tobytes() == image.tobytes()


def test_words_share_a_colour_and_are_written_once() -> None:
    image = Image.new("RGB", (200, 200), GREY)
    first, same, other = (
        Box(10, y, 190, y + 30, ref, 0) for y, ref in ((20, "a"), (70, "a"), (120, "b"))
    )
    drawn = draw_boxes(image, [first, same, other])
    colours = [drawn.getpixel((190, box.y2)) for box in (first, same, other)]
    assert colours[0] == colours[1] != colours[2]
    labels = [
        any((14, box.y1 - 4 - i) in changed(drawn) for i in range(3)) for box in (first, same)
    ]
    assert labels == [True, False]


@pytest.mark.parametrize("font", [None, ImageFont.load_default_imagefont()])
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(*[st.integers(-5, 70)] * 4),
    st.none() | st.text(max_size=8),
)
@settings(max_examples=60)
def test_anything_can_be_drawn(
    font: ImageFont.ImageFont | None,
    size: tuple[int, int],
    corner: tuple[int, int, int, int],
    ref: str | None,
) -> None:
    image = Image.new("L", size)
    assert draw_boxes(image, [Box(*corner, ref, 0)] * 2, font=font).size == size
