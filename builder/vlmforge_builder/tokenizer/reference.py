"""The tokenizer of the original implementations: SentencePiece behind a splitter of added tokens.

Independent of the `tokenizers` library and of the conversion; the oracle of the proof. Follows the
Python ("slow") SentencePiece tokenizer of transformers 4.37.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import sentencepiece

from vlmforge_builder.tokenizer.added_tokens import AddedTokens
from vlmforge_builder.tokenizer.proto import parse_model

_SPACE = "\u2581"


class ReferenceTokenizer:
    """Encodes as the original does; adds no BOS and no EOS.

    Args:
        model: A serialised SentencePiece model.
        added: Added tokens.
        legacy: True: SentencePiece sees each section between added tokens as a text of its own, so
            it puts its dummy prefix before each. False: one prefix before the whole text, unless
            the text begins with a special token.
    """

    def __init__(self, model: bytes, added: AddedTokens, *, legacy: bool) -> None:
        self._legacy = legacy
        self._added = {token.text: token for token in added.tokens}
        self._special = added.named_special
        self._unk = added.roles.get("unk", "<unk>")
        longest_first = sorted(self._added, key=len, reverse=True)
        self._splitter = re.compile("|".join(map(re.escape, longest_first)))
        self._model = sentencepiece.SentencePieceProcessor(
            model_proto=model if legacy else _without_prefix(model)
        )
        self._unk_length = len(self._model.encode(self._unk, out_type=str))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        if self._legacy or not text:
            return self._ids(self._pieces(text))
        pieces = self._pieces(_SPACE + text.replace(_SPACE, " "))
        if len(pieces) > 1 and pieces[0] == _SPACE and pieces[1] in self._special:
            del pieces[0]
        return self._ids(pieces)

    def _ids(self, pieces: Iterable[str]) -> list[int]:
        return [
            self._added[piece].id if piece in self._added else self._model.piece_to_id(piece)
            for piece in pieces
        ]

    def _pieces(self, text: str) -> list[str]:
        pieces: list[str] = []
        for section in self._sections(text):
            if section in self._added:
                pieces.append(section)
            elif section:
                pieces += self._section_pieces(section)
        return pieces

    def _sections(self, text: str) -> list[str]:
        """Text and added tokens in turn; some take the white space beside them away."""
        sections = []
        end = 0
        for match in self._splitter.finditer(text):
            sections += [text[end : match.start()], match.group()]
            end = match.end()
        sections.append(text[end:])
        for place in range(1, len(sections), 2):
            token = self._added[sections[place]]
            if token.lstrip:
                sections[place - 1] = sections[place - 1].rstrip()
            if token.rstrip:
                sections[place + 1] = sections[place + 1].lstrip()
        return sections

    def _section_pieces(self, section: str) -> list[str]:
        if self._legacy or not section.startswith((_SPACE, " ")):
            pieces: list[str] = self._model.encode(section, out_type=str)
            return pieces
        # SentencePiece may strip spaces at the beginning, so it gets one that does not begin there.
        pieces = self._model.encode(self._unk + section, out_type=str)
        return pieces[self._unk_length :] if len(pieces) >= self._unk_length else pieces


def _without_prefix(model: bytes) -> bytes:
    proto = parse_model(model)
    proto.normalizer_spec.add_dummy_prefix = False
    data: bytes = proto.SerializeToString()
    return data
