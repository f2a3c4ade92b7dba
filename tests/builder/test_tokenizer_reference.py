"""The oracle of the proof against the code that still lives on in transformers."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from sentencepiece_models import TEXTS, trained, write_checkpoint
from vlmforge_builder.tokenizer.added_tokens import AddedToken, read_added_tokens
from vlmforge_builder.tokenizer.files import read_tokenizer_files
from vlmforge_builder.tokenizer.reference import ReferenceTokenizer
from vlmforge_builder.tokenizer.sentencepiece_bpe import read_sentencepiece

PREFIX = "\u2581"
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
EXTRA = {
    "<pad>": {"special": True},
    "<image>": {"special": True, "lstrip": True},
    "[X]": {"special": False, "rstrip": True},
}


class Original(SentencePieceBackend):
    """Its own `tokenize` is what transformers 4.37.2 has in tokenization_llama.py."""

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        if self.legacy or len(text) == 0:
            return list(super().tokenize(text, *args, **kwargs))
        tokens = list(super().tokenize(PREFIX + text.replace(PREFIX, " "), *args, **kwargs))
        if len(tokens) > 1 and tokens[0] == PREFIX and tokens[1] in self.all_special_tokens:
            tokens = tokens[1:]
        return tokens


@cache
def both(legacy: bool, dummy_prefix: bool, strip: bool) -> tuple[Original, ReferenceTokenizer]:
    model = trained(add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=strip)
    base = 420
    decoder = {
        str(base + i): {"content": text, **PLAIN, **traits}
        for i, (text, traits) in enumerate(EXTRA.items())
    }
    config = {"added_tokens_decoder": decoder, "pad_token": "<pad>", "legacy": legacy}
    config["additional_special_tokens"] = ["<image>"]
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), model, config)
        files = read_tokenizer_files(folder)
        read = read_sentencepiece(folder / "tokenizer.model")
        added = read_added_tokens(files, read.pieces)
        make: Any = Original
        theirs = make(
            vocab_file=str(folder / "tokenizer.model"),
            legacy=legacy,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            added_tokens_decoder=_as_theirs(added.tokens),
            extra_special_tokens=["<image>"],
        )
    return theirs, ReferenceTokenizer(model, added, legacy=legacy)


def _as_theirs(tokens: tuple[AddedToken, ...]) -> dict[int, Any]:
    from transformers import AddedToken as Theirs

    return {
        t.id: Theirs(t.text, lstrip=t.lstrip, rstrip=t.rstrip, special=t.special, normalized=False)
        for t in tokens
    }


@settings(max_examples=400)
@given(TEXTS, st.booleans(), st.booleans(), st.booleans())
def test_the_reference_encodes_as_transformers_does(
    text: str, legacy: bool, dummy_prefix: bool, strip: bool
) -> None:
    theirs, ours = both(legacy, dummy_prefix, strip)
    assert ours.encode(text) == theirs.convert_tokens_to_ids(theirs.tokenize(text))


@pytest.mark.parametrize(
    ("legacy", "text", "pieces"),
    [
        (False, "the", ["▁the"]),
        (False, "<s>the", ["<s>", "the"]),
        (False, "<s> the", ["<s>", "▁the"]),
        (False, "[X]a", ["▁", "[X]", "a"]),
        (True, "<s>the", ["<s>", "▁the"]),
        (True, "<s> the", ["<s>", "▁", "▁the"]),
        (True, "a <image>a", ["▁a", "<image>", "▁a"]),
    ],
)
def test_where_the_prefix_goes(legacy: bool, text: str, pieces: list[str]) -> None:
    theirs, ours = both(legacy, True, False)
    assert theirs.convert_ids_to_tokens(ours.encode(text)) == pieces
