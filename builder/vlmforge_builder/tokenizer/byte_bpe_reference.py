"""Byte-level BPE by ranks, written from its definition: the oracle of the conversion's proof.

Independent of the `tokenizers` library and its regular expressions. The text is cut by a scanner
that asks Python's own Unicode tables.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# White space of Unicode; `str.isspace` has the separators U+001C to U+001F besides.
_SPACES = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | frozenset(
    map(chr, range(0x2000, 0x200B))
)


class ByteReference:
    """Encodes as the original does.

    Args:
        ranks: Ids of the tokens, by their bytes.
        specials: Ids of the tokens that are cut out of the text before it is merged.
    """

    def __init__(self, ranks: Mapping[bytes, int], specials: Mapping[str, int]) -> None:
        self._ranks, self._specials = ranks, specials
        self._splitter = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        text = unicodedata.normalize("NFC", text)
        ids, end = list[int](), 0
        for match in self._splitter.finditer(text):
            ids += self._ordinary(text[end : match.start()])
            ids.append(self._specials[match.group()])
            end = match.end()
        return ids + self._ordinary(text[end:])

    def _ordinary(self, text: str) -> list[int]:
        ids = []
        for piece in split_text(text):
            data = piece.encode("utf-8")
            whole = self._ranks.get(data)
            parts = [data] if whole is not None else merge_pieces(data, self._ranks)
            ids += [self._ranks[part] for part in parts]
        return ids


def merge_pieces(
    data: bytes, ranks: Mapping[bytes, int], *, below: int | None = None
) -> list[bytes]:
    """Merge neighbours, the pair of the lowest rank first and of several the leftmost.

    `below` forbids tokens of that rank and higher ones.
    """
    parts = [bytes([byte]) for byte in data]
    limit = len(ranks) if below is None else below
    while len(parts) > 1:
        found = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(found)
        if best >= limit:
            break
        place = found.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def split_text(text: str) -> Iterator[str]:
    """Cut text into pieces: contractions, words, single digits, marks, and white space."""
    start = 0
    while start < len(text):
        end = _piece_end(text, start)
        yield text[start:end]
        start = end


def _piece_end(text: str, start: int) -> int:
    for word in _CONTRACTIONS:
        given = text[start : start + len(word)]
        # Case is folded: the long s is an s too.
        if given.casefold() == word and len(given) == len(word):
            return start + len(word)
    first = text[start]
    body = start if _is_letter(first) else start + 1
    if not _is_number(first) and first not in "\r\n" and (end := _run(text, body, _is_letter)):
        return end
    if _is_number(first):
        return start + 1
    body = start + 1 if first == " " else start
    if end := _run(text, body, _is_mark):
        return _run(text, end, "\r\n".__contains__) or end
    return _space_end(text, start)


def _space_end(text: str, start: int) -> int:
    """Spaces up to the last line break; else all but the one before a word; else all."""
    end = _run(text, start, _SPACES.__contains__) or start
    breaks = [i for i in range(start, end) if text[i] in "\r\n"]
    if breaks:
        return breaks[-1] + 1
    if end == len(text) or end == start + 1:
        return end
    return end - 1


def _run(text: str, start: int, belongs: object) -> int:
    """Where a run from `start` on ends, 0 if there is none."""
    end = start
    while end < len(text) and belongs(text[end]):  # type: ignore[operator]
        end += 1
    return end if end > start else 0


def _is_letter(character: str) -> bool:
    return unicodedata.category(character).startswith("L")


def _is_number(character: str) -> bool:
    return unicodedata.category(character).startswith("N")


def _is_mark(character: str) -> bool:
    return not (_is_letter(character) or _is_number(character) or character in _SPACES)
