"""Questions about the user's own pictures: JSON lines with an image, a question and its answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from msgspec import Struct

from vlmforge.engine.schema import parse_json
from vlmforge.errors import ConfigError
from vlmforge.evaluation.answers import normalised
from vlmforge.field_rules import shown

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.ASCII)
_FORM = '{"image": "path, URL or null", "question": "...", "answers": ["...", ...]}'


class Question(Struct, frozen=True):
    """A line.

    Attributes:
        line: Its number in the file, from 1.
        image: An absolute path or an address; None: the question is about no image.
        question: What is asked.
        answers: Those that are right.
    """

    line: int
    image: str | None
    question: str
    answers: tuple[str, ...]


def read_questions(path: Path) -> tuple[Question, ...]:
    """All questions of a file; images are not opened, but files are there.

    Each line is an object with "question" (text), "answers" (a list of at least one text) and
    "image": a path, relative to the file's folder, a URL, or null, which may also be left out.
    Other keys are left alone, and so are lines of white space.

    Raises:
        ConfigError: the file cannot be read or has no question, or a line is not of that form;
            names the line and its field.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read.",
            found=getattr(error, "strerror", None) or str(error),
            expected="a file of JSON lines",
            fix=f"each line: {_FORM}",
        ) from error
    found = tuple(_questions(path, content.removeprefix(b"\xef\xbb\xbf")))
    if not found:
        raise ConfigError(
            f"{path} has no question.",
            found=f"{len(content)} bytes without a line of JSON",
            expected="at least one",
            fix=f"each line: {_FORM}",
        )
    return found


def _questions(path: Path, content: bytes) -> Iterator[Question]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield _Line(path, number).question(line)


class _Line(Struct, frozen=True):
    path: Path
    number: int

    def question(self, line: bytes) -> Question:
        try:
            data = parse_json(line.decode("utf-8"))
        except ValueError as error:
            self._refuse(None, str(error), "one JSON object, in UTF-8")
        if not isinstance(data, dict):
            self._refuse(None, shown(data), "one JSON object")
        question = data.get("question")
        if not isinstance(question, str) or not question.strip():
            self._refuse("question", self._given(data, "question"), "a text that is not empty")
        return Question(self.number, self._image(data), question, self._answers(data))

    def _answers(self, data: dict[str, object]) -> tuple[str, ...]:
        answers = data.get("answers")
        if not isinstance(answers, list) or not answers:
            self._refuse("answers", self._given(data, "answers"), "a list of at least one text")
        for answer in answers:
            if not isinstance(answer, str) or not normalised(answer):
                self._refuse("answers", f"{shown(answer)} in it", "texts with a word in each")
        return tuple(answers)

    def _image(self, data: dict[str, object]) -> str | None:
        image = data.get("image")
        if image is None:
            return None
        if not isinstance(image, str) or not image.strip():
            self._refuse("image", self._given(data, "image"), "a path, a URL or null")
        if _ADDRESS.match(image):
            return image
        try:
            file = (self.path.parent / image).absolute()
            there = file.is_file()
        except (OSError, ValueError):  # too long, or with a NUL character
            there = False
        if not there:
            self._refuse(
                "image", f"no such file: {shown(image)}", f"a file, seen from {self.path.parent}"
            )
        return str(file)

    def _given(self, data: dict[str, object], field: str) -> str:
        return shown(data[field]) if field in data else "no such field"

    def _refuse(self, field: str | None, found: str, expected: str) -> NoReturn:
        where = f"Line {self.number} of {self.path}"
        raise ConfigError(
            f"{where} is not a question."
            if field is None
            else f"{where}: {field!r} is not usable.",
            found=found[:300],
            expected=expected,
            fix=f"each line: {_FORM}",
        )
