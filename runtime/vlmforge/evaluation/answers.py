"""When a reply is right: by its words, not by how they are written.

Normalised as VQA's evaluation does it (https://visualqa.org/evaluation.html), without its table of
contractions: apostrophes are left out on both sides instead.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SAME = {**{word: str(number) for number, word in enumerate(_NUMBERS)}, "none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_LEFT_OUT = re.compile(r"['’`]|(?<=\d),(?=\d{3})")
_WORD = re.compile(r"\d+(?:\.\d+)+|[^\W_]+")


def normalised(text: str) -> tuple[str, ...]:
    """The words of a text that count.

    In lower case, compatible characters alike (NFKC), apostrophes and the commas inside numbers
    left out, every other punctuation a space (but the points inside numbers); numbers to ten in
    digits, "none" as 0, and without the articles a, an and the.
    """
    plain = _LEFT_OUT.sub("", unicodedata.normalize("NFKC", text).casefold())
    words = _WORD.findall(plain)
    kept = [_SAME.get(word, word) for word in words if word not in _ARTICLES]
    return tuple(kept or words)  # the answer may be the letter A


def is_exact(reply: str, answers: Iterable[str]) -> bool:
    """Whether the reply has the words of one of the answers, in order, and no others."""
    said = normalised(reply)
    return any(said == normalised(answer) for answer in answers)


def contains(reply: str, answers: Iterable[str]) -> bool:
    """Whether the words of one of the answers come in the reply, in order and side by side."""
    said = normalised(reply)
    for words in map(normalised, answers):
        starts = range(len(said) - len(words) + 1)
        if any(said[start : start + len(words)] == words for start in starts):
            return True
    return False
