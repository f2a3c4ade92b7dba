"""`vlmforge eval --data`: the user's questions, what makes a reply right, and the gate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stand_in import Parts, plain, png, stand_in
from vlmforge.cli import main
from vlmforge.errors import ConfigError
from vlmforge.evaluation.answers import contains, is_exact, normalised
from vlmforge.evaluation.dataset import Question, read_questions

# --- what makes a reply right -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "answer", "exact", "contained"),
    [
        ("A red car.", "red car", True, True),
        ("It is a red car, I think", "the Red Car", False, True),
        ("reddish car", "red car", False, False),
        ("There are two.", "2", False, True),
        ("none", "0", True, True),
        ("1,000 m", "1000 m", True, True),
        ("1, 2", "12", False, False),
        ("3.5", "3.5", True, True),
        ("3.5.", "3.5", True, True),
        ("3 5", "3.5", False, False),
        ("don't", "dont", True, True),
        ("don’t know", "don't", False, True),
        ("stop-sign", "stop sign", True, True),
        ("ＣＡＦＥ", "cafe", True, True),
        ("STRASSE", "straße", True, True),
        ("A", "a", True, True),
        ("猫です", "猫です", True, True),
        ("", "yes", False, False),
        ("sign stop", "stop sign", False, False),
        ("under_score", "under score", True, True),
    ],
)
def test_words_count_and_not_how_they_are_written(
    reply: str, answer: str, exact: bool, contained: bool
) -> None:
    assert is_exact(reply, [answer]) == exact
    assert contains(reply, [answer]) == contained
    assert is_exact(reply, ["something else entirely", answer]) == exact


@given(text=st.text(), other=st.text(max_size=5))
def test_normalising_is_done_once(text: str, other: str) -> None:
    words = normalised(text)
    assert normalised(" ".join(words)) == words
    assert contains(f"{text}", [text])
    assert contains(f"say {text} please", [text]) or not words or set(words) <= {"a", "an", "the"}
    assert not is_exact(text, [other]) or normalised(other) == words


# --- the file -----------------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


GOOD = {"image": None, "question": "How many?", "answers": ["2"]}


def test_lines_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "images/a b.png").write_bytes(png(1))
    path = write(
        folder / "q.jsonl",
        {**GOOD, "image": "images/a b.png", "id": 7},
        "",
        {"question": "É?", "answers": ["oui", "yes"]},
        {**GOOD, "image": "https://example.org/x.png"},
        {**GOOD, "image": "data:image/png;base64,AAAA"},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.chdir(folder)
    for way in (path, Path("q.jsonl")):
        assert read_questions(way) == (
            Question(1, str(folder / "images/a b.png"), "How many?", ("2",)),
            Question(3, None, "É?", ("oui", "yes")),
            Question(4, "https://example.org/x.png", "How many?", ("2",)),
            Question(5, "data:image/png;base64,AAAA", "How many?", ("2",)),
        )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", ["is not a question"]),
        ("[1]", ["is not a question", "one JSON object"]),
        ('{"question": "a", "question": "b"}', ["twice"]),
        ("\\xff", ["is not a question"]),
        ({"answers": ["2"]}, ["'question'", "no such field"]),
        ({**GOOD, "question": " "}, ["'question'", "not empty"]),
        ({**GOOD, "question": 3}, ["'question'", "3"]),
        ({"question": "a"}, ["'answers'", "no such field"]),
        ({**GOOD, "answers": "2"}, ["'answers'", "'2'"]),
        ({**GOOD, "answers": []}, ["'answers'", "at least one"]),
        ({**GOOD, "answers": ["2", 3]}, ["'answers'", "3 in it"]),
        ({**GOOD, "answers": ["?!"]}, ["'answers'", "a word"]),
        ({**GOOD, "image": 3}, ["'image'", "3"]),
        ({**GOOD, "image": ""}, ["'image'", "null"]),
        ({**GOOD, "image": "gone.png"}, ["'image'", "gone.png", "no such file"]),
        ({**GOOD, "image": "."}, ["'image'", "no such file"]),
        ({**GOOD, "image": "x" * 5000}, ["'image'", "no such file"]),
        ({**GOOD, "image": "a\0b"}, ["'image'", "no such file"]),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, row: Any, words: list[str]) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, row)
    if row == "\\xff":
        path.write_bytes(path.read_bytes().replace(b"\\xff", b"\xff"))
    with pytest.raises(ConfigError) as caught:
        read_questions(path)
    text = str(caught.value)
    assert f"Line 2 of {path}" in text
    assert all(word in text for word in words), text
    assert '"answers": [' in caught.value.fix


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no question"):
        read_questions(write(tmp_path / "q.jsonl", "", "  "))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_questions(tmp_path / "gone.jsonl")


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four questions: two answered word for word, one in passing, and a picture that is none."""
    monkeypatch.setattr("vlmforge.cli.eval_data.pipeline", lambda engine: stand_in(Parts(3)))
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with stand_in() as pipe:

        def says(question: str, image: str | None) -> str:
            content: list[dict[str, Any]] = [{"type": "text", "text": question}]
            if image is not None:
                url = {"url": str(tmp_path / image)}
                content.insert(0, {"type": "image_url", "image_url": url})
            return pipe([{"role": "user", "content": content}], plain(12)).text  # type: ignore[union-attr]

        rows = [
            {"image": "a.png", "question": "one", "answers": ["wrong", says("one", "a.png")]},
            {"image": None, "question": "two", "answers": [says("two", None)]},
            {"question": "three", "answers": [re.findall(r"[a-z0-9]+", says("three", None))[0]]},
            {"image": "broken.png", "question": "four", "answers": ["x"]},
        ]
    return write(tmp_path / "q.jsonl", *rows)


def run(data: Path, *options: str) -> int:
    return main(["eval", "ENGINE", "--data", str(data), "--max-new-tokens", "12", *options])


def test_accuracy_by_both_rules(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data) == 0
    out, err = capsys.readouterr()
    assert re.search(r"contains +4 +75\.0% +30\.1% to 95\.4%", out)
    assert re.search(r"exact +4 +50\.0% ", out)
    assert "1 could not be asked" in out
    assert "line 4: " in out
    assert "not an image" in out
    assert "asked 4 of 4" in err


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (("--min-accuracy", "75"), 0),
        (("--min-accuracy", "75.1"), 1),
        (("--min-accuracy", "50", "--match", "exact"), 0),
        (("--min-accuracy", "51", "--match", "exact"), 1),
        (("--min-accuracy", "100", "--limit", "2"), 0),
        (("--min-accuracy", "0"), 0),
    ],
)
def test_the_gate(
    data: Path, options: tuple[str, ...], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, *options) == status
    assert ("FAIL" in capsys.readouterr().err) == bool(status)


def test_results_are_lines_of_json(data: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert run(data, "--results", str(results)) == 0
    rows = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert [row["exact"] for row in rows] == [True, True, False, False]
    assert [row["contains"] for row in rows] == [True, True, True, False]
    assert rows[0]["image"] == str(tmp_path / "a.png")
    assert rows[0]["reply"] == rows[0]["answers"][1]
    assert [row["finish_reason"] for row in rows] == ["length"] * 3 + ["error"]
    assert rows[3]["error"]
    assert rows[2]["error"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", "1"), "--seed with --data"),
        (("--minimum", "all=3"), "--minimum with --data"),
        (("--limit", "0"), "--limit 0"),
        (("--min-accuracy", "101"), "--min-accuracy 101"),
        (("--min-accuracy", "nan"), "--min-accuracy nan"),
        (("--results", "no/such/folder/r.jsonl"), "cannot be written"),
    ],
)
def test_options_that_make_no_sense(
    data: Path, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, *options) == 1
    assert words in capsys.readouterr().err


def test_options_of_data_need_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "ENGINE", "--match", "exact"]) == 1
    assert "--match without --data" in capsys.readouterr().err
