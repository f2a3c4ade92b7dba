"""Text between images to ids, as a whole or in pieces that are encoded apart."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from msgspec import Struct, field

from vlmforge.engine.prompts import PromptPolicy
from vlmforge.inputs import image_marks as marks

_BORDER = re.compile(f"({marks.OPEN}|{marks.CLOSE})")


class TextEncoder(Protocol):
    """Text to ids; no special token is added."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it recognised."""

    def encode_only(self, text: str, tokens: Collection[str]) -> list[int]:
        """Ids of `text`; only these special tokens are recognised in it."""


class Encoded(Struct):
    """The text before, between or after images.

    Attributes:
        ids: Its ids.
        contents: Places in `ids` where the content of a message begins.
    """

    ids: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)


def encode_chunks(
    chunks: Sequence[str], policy: PromptPolicy, encoder: TextEncoder
) -> list[Encoded]:
    """Ids of the chunks of a text that was cut at its images."""
    if policy.content_tokens is not None:
        pieces = _apart(chunks, policy.content_tokens, encoder)
    elif policy.splice.whole:
        pieces = [Encoded()]
        for token in encoder.encode(marks.IMAGE.join(chunks)):
            if token == policy.image_token_id:
                pieces.append(Encoded())
            else:
                pieces[-1].ids.append(token)
    else:
        pieces = [Encoded(encoder.encode(chunk)) for chunk in chunks]
    first = pieces[0]
    if policy.bos_id is not None and first.ids[:1] != [policy.bos_id]:
        first.ids.insert(0, policy.bos_id)
        first.contents = [start + 1 for start in first.contents]
    return pieces


def _apart(
    chunks: Sequence[str], content_tokens: Collection[str], encoder: TextEncoder
) -> list[Encoded]:
    pieces, depth = [], 0
    for chunk in chunks:
        encoded = Encoded()
        for piece in _split(chunk, depth):
            depth = piece.depth
            if piece.begins:
                encoded.contents.append(len(encoded.ids))
            known = encoder.encode_only(piece.text, content_tokens) if depth else None
            encoded.ids += encoder.encode(piece.text) if known is None else known
        pieces.append(encoded)
    return pieces


class _Piece(Struct, frozen=True):
    """Text that is encoded apart.

    `depth`: of marks around its end, 0 outside of contents; `begins`: a content begins with it.
    """

    text: str
    depth: int
    begins: bool


def _split(chunk: str, depth: int) -> Iterator[_Piece]:
    """Pieces of a chunk that begins at `depth`; the last tells the depth of its end.

    A template may mark what is marked already: only the outer marks are borders.
    """
    text, begins = "", False
    for part in _BORDER.split(chunk):
        change = {marks.OPEN: 1, marks.CLOSE: -1}.get(part, 0)
        if change == 0:
            text += part
        elif min(depth, depth + change) == 0:
            yield _Piece(text, depth, begins)
            text, begins = "", change == 1
        depth += change
    yield _Piece(text, depth, begins)


def without_borders(text: str) -> str:
    """The text without the marks of contents."""
    return _BORDER.sub("", text)
