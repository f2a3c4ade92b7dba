"""What people type: image sources in a line, and lines from a pipe."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from typing import Protocol, TextIO

from typing_extensions import override

_BLOCK = '"""'
_WORD = re.compile(r"""(["'])(?P<quoted>.*?)\1(?=\s|$)|\S+""", re.DOTALL)
# Of a file's name; so that a text pasted by mistake is not looked up by all its stretches.
_MAX_WORDS = 32


class Lines(Protocol):
    """Where the lines of a chat come from."""

    def read(self) -> str | None:
        """The next message or command, maybe of several lines; None at the end."""


class PlainLines(Lines):
    """Lines of a pipe or a file. A message of several stands between two marks of three quotes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @override
    def read(self) -> str | None:
        line = self._stream.readline()
        if not line:
            return None
        if not line.strip().startswith(_BLOCK):
            return line.rstrip("\n")
        text = line.strip().removeprefix(_BLOCK)
        while _BLOCK not in text and (line := self._stream.readline()):
            text += ("\n" if text else "") + line.rstrip("\n")
        return text.partition(_BLOCK)[0].removesuffix("\n")


def image_sources(text: str) -> list[str]:
    """The paths and URLs of a line, as they were meant.

    Nothing is special in a name that a file has: the longest stretch that is one is taken as it
    is typed, with its spaces, quotes and backslashes; else the longest that is one as a shell
    reads it (terminals write a dropped file's name so). What is no file is read by words, without
    the quotes around them. `~` is home.
    """
    found, words = list[str](), list(_WORD.finditer(text))
    while words:
        source, used = _longest_file(text, words) or (words[0]["quoted"] or words[0][0], 1)
        found.append(source)
        words = words[used:]
    return found


def _longest_file(text: str, words: list[re.Match[str]]) -> tuple[str, int] | None:
    """A file's path, and how many of the words it takes."""
    start = words[0].start()
    for used in range(min(len(words), _MAX_WORDS), 0, -1):
        stretch = text[start : words[used - 1].end()]
        if path := _file(stretch) or _file(_as_shell(stretch)):
            return path, used
    return None


def _as_shell(text: str) -> str:
    """The one word that a shell would make of it; empty if it would not."""
    try:
        (word,) = shlex.split(text)
    except ValueError:
        return ""
    return word


def _file(name: str) -> str | None:
    """The path of a file that is there: `name` itself, or with its `~` written out."""
    # Not pathlib's, which raise for names that no system takes and for homes that nobody has.
    paths = (name, os.path.expanduser(name))  # noqa: PTH111
    return next((path for path in paths if os.path.isfile(path)), None)  # noqa: PTH113


def path_beginnings(text: str) -> Iterator[str]:
    """What may be the beginning of the last path in a line, the longest first."""
    for word in _WORD.finditer(text):
        stretch = text[word.start() :]
        yield stretch.removeprefix(stretch[0]) if stretch[0] in "\"'" else stretch
