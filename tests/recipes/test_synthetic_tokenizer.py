from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vlmforge_recipes.llava.synthetic.tokenizer import write_hf_tokenizer


@cache
def tokenizers() -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer]:
    with tempfile.TemporaryDirectory() as name:
        write_hf_tokenizer(Path(name))
        slow = sentencepiece.SentencePieceProcessor(
            model_proto=(Path(name) / "tokenizer.model").read_bytes()
        )
        return slow, Tokenizer.from_file(str(Path(name) / "tokenizer.json"))


def slow_ids(chunks: list[str]) -> list[int]:
    """The original way: each text between two images is encoded by itself."""
    slow, _ = tokenizers()
    ids = [1]
    for number, chunk in enumerate(chunks):
        ids += [640] * (number > 0) + slow.encode(chunk)
    return ids


LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<"), max_size=40)
WORDS = st.lists(
    st.sampled_from(
        ["the", "picture", " ", "  ", "\n", "USER:", "图片", "é", "42", "?", "\t", "🙂"]
    ),
    max_size=30,
).map("".join)


@settings(max_examples=200)
@given(st.lists(LINES | WORDS, min_size=1, max_size=3))
def test_tokenizer_json_equals_sentencepiece(chunks: list[str]) -> None:
    _, fast = tokenizers()
    assert fast.encode("<image>".join(chunks)).ids == slow_ids(chunks)


@given(WORDS)
def test_tokenizer_json_gives_the_text_back(text: str) -> None:
    _, fast = tokenizers()
    assert fast.decode(fast.encode(text).ids) == text


def test_the_tokenizer_has_the_traits_of_the_published_one() -> None:
    slow, fast = tokenizers()
    assert slow.get_piece_size() == 640
    assert [slow.id_to_piece(index) for index in (0, 1, 2, 13)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x0A>",
    ]
    blank = slow.piece_to_id("\u2581")
    assert fast.encode("<image>\nHi").ids[:4] == [1, 640, blank, 13]
    assert fast.encode("a</s><pad>").ids[-2:] == [2, 641]
    assert len(fast.encode("What is shown in this picture?").ids) < 20
