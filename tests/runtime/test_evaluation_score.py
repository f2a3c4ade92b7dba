"""What counts as right, how sure a share is, and the picture sheet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmforge.evaluation.cases import Case
from vlmforge.evaluation.evaluate import Answer, Report
from vlmforge.evaluation.questions import Turn
from vlmforge.evaluation.score import facts, wilson
from vlmforge.evaluation.sheet import html_sheet


@pytest.mark.parametrize(
    ("kind", "expected", "reply", "right"),
    [
        ("color", "The star is red.", "It's RED!", True),
        ("color", "The star is red.", "The star is red or blue.", False),
        ("color", "The star is red.", "", False),
        ("count", "There are two stars.", "2", True),
        ("count", "There are no stars.", "zero", True),
        ("count", "There are two stars.", "There are three stars.", False),
        ("place", "The star is in the centre.", "In the middle of the picture", True),
        ("place", "The star is at the top left.", "at the top", False),
        ("yes_no", "No, there is no star.", "No.", True),
        ("yes_no", "Yes, there is a star.", "There is a star.", False),
        ("size", "The star is large.", "A big one", True),
        ("compare", "The first picture.", "the first", True),
        ("compare", "Both have two.", "The first picture.", False),
        (
            "describe",
            "A small red star on the left and a large blue cross on the right.",
            "a large blue cross on the right, a small red star on the left",
            False,
        ),
        ("refusal", "I cannot answer that.", "i cannot answer that", True),
        ("refusal", "I cannot answer that.", "The star is red.", False),
    ],
)
def test_a_reply_is_right_when_its_facts_are(
    kind: str, expected: str, reply: str, right: bool
) -> None:
    assert (facts(kind, reply) == facts(kind, expected)) is right


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 500), st.integers(0, 500))
def test_the_interval_holds_the_share(right: int, more: int) -> None:
    low, high = wilson(right, right + more)
    assert 0 <= low <= high <= 1
    if right + more:
        assert low - 1e-9 <= right / (right + more) <= high + 1e-9


def answer(kind: str, reply: str, *, right: bool) -> Answer:
    picture = Image.new("RGB", (4, 3), (1, 2, 3))
    case = Case((picture,), (Turn(kind, "Is <it> red?", "Yes, it is."),))
    return Answer(case, (reply,), right, exact=False)


def test_a_report_counts_by_kind() -> None:
    answers = (
        answer("color", "a", right=True),
        answer("color", "b", right=False),
        answer("count", "c", right=True),
    )
    report = Report(answers, 30, 2.0)
    assert [(s.kind, s.count, s.right) for s in report.scores] == [("color", 2, 1), ("count", 1, 1)]
    assert report.overall.accuracy == pytest.approx(2 / 3)


def test_the_sheet_shows_wrong_ones_first_and_escapes_what_was_said() -> None:
    answers = (answer("color", "right one", right=True), answer("color", "<b>no</b>", right=False))
    page = html_sheet(Report(answers, 1, 1.0), "engine & co", limit=5)
    assert page.index("&lt;b&gt;no") < page.index("right one")
    assert "<b>no" not in page
    assert "engine &amp; co" in page
    assert "Is &lt;it&gt; red?" in page
    assert page.count("data:image/png;base64,") == 2


def test_the_sheet_is_limited() -> None:
    answers = tuple(answer("color", f"reply {i}", right=False) for i in range(9))
    assert html_sheet(Report(answers, 1, 1.0), "t", limit=4).count("reply ") == 4
