"""A vocabulary of ranks as a `tokenizer.json`: equal to the ranks, or refused."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from qwen_original import CONTROL, IMAGE_ST, SPLIT, Tokens
from vlmforge.errors import TokenizerError
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.outputs.detokenizer import IncrementalDetokenizer
from vlmforge_builder.tokenizer import byte_bpe
from vlmforge_builder.tokenizer.byte_bpe import (
    SpecialTokens,
    convert_byte_bpe,
    expect_ids,
    merges,
    read_ranks,
)
from vlmforge_builder.tokenizer.byte_bpe_reference import ByteReference, split_text

GOLDEN = DATA / "qwen_vl_chat"
VOCABULARY = GOLDEN / "checkpoint" / "qwen.tiktoken"
ALL = (*CONTROL, *IMAGE_ST)
SPECIALS = SpecialTokens(ALL, frozenset((*CONTROL, *IMAGE_ST[6:])), ALL[:3])
TEXTS = st.text(
    st.one_of(
        st.sampled_from(
            "aeinorst  \n\r\t'sSlLtdvem019.,!?<>|_éü\u0301图中是什么ſK½²٣👍\u200b\u3000\x1c"
        ),
        st.characters(codec="utf-8", max_codepoint=0x2FFF, exclude_categories=("Cn", "Co", "Cs")),
    ),
    max_size=60,
)
MIXED = st.lists(st.one_of(TEXTS, st.sampled_from(ALL)), max_size=6).map("".join)


@cache
def tokens() -> Tokens:
    return Tokens.read(VOCABULARY)


@cache
def converted() -> TextTokenizer:
    return TextTokenizer(convert_byte_bpe(VOCABULARY, SPECIALS).json.decode())


def test_goldens() -> None:
    """Those without an image: its name is spelled by other rules."""
    cases = json.loads((GOLDEN / "tokenizer_cases.json").read_text("utf-8"))
    plain = [case for case in cases if "decoded" in case and "<img>" not in case["text"]]
    assert len(plain) >= 11
    for case in plain:
        assert converted().encode(case["text"]) == case["ids_all_special"]
        allowed = converted().encode_only(case["text"], IMAGE_ST)
        assert allowed == case["ids_image_special_only"]
        shown = converted().decode(
            case["ids_all_special"], skip_special_tokens=False, spaces_between_special_tokens=False
        )
        assert shown == case["decoded"]


@given(MIXED)
def test_it_encodes_as_published(text: str) -> None:
    for allowed in ((), IMAGE_ST[:6], (*CONTROL, *IMAGE_ST[:6])):
        expected = tokens().encode(text, allowed) if allowed else _plain(text)
        assert converted().encode_only(text, allowed) == expected


def _plain(text: str) -> list[int]:
    return tokens().encode(text, ["\0 no such token \0"])


@given(TEXTS)
@settings(max_examples=300)
def test_the_reference_cuts_text_as_the_published_pattern(text: str) -> None:
    assert list(split_text(text)) == SPLIT.findall(text)


@given(st.lists(st.integers(0, 727), max_size=40))
@settings(max_examples=200)
def test_pieces_of_a_stream_are_the_whole(ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(converted())
    pieces = [detokenizer.push([token]) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == converted().decode(ids)


# --- drawn vocabularies -------------------------------------------------------------------------


def drawn_ranks(seed: int, size: int, alphabet: bytes = b"abc \xc3\xa9") -> dict[bytes, int]:
    """Every byte in any order, then tokens made of two earlier ones."""
    rng = random.Random(seed)
    known = [bytes([byte]) for byte in rng.sample(range(256), 256)]
    parts = [bytes([byte]) for byte in alphabet]
    while len(known) < size:
        token = rng.choice(parts) + rng.choice(parts)
        if token not in known and len(token) < 9:
            known.append(token)
            parts.append(token)
    return {token: rank for rank, token in enumerate(known)}


def write(path: Path, ranks: Sequence[tuple[bytes, int]]) -> Path:
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("seed", range(6))
def test_drawn_vocabularies(tmp_path: Path, seed: int) -> None:
    """Whatever is converted is equal; the order of the lines says nothing."""
    ranks = drawn_ranks(seed, 290)
    lines = random.Random(seed).sample(list(ranks.items()), len(ranks))
    path = write(tmp_path / "some.tiktoken", lines)
    small = SpecialTokens(("<end>", "<x>"), frozenset(("<end>",)), ("<end>",))
    made = convert_byte_bpe(path, small)
    assert (made.eos_ids, made.vocab_size, made.special_ids) == ((290,), 292, (290,))
    assert made.token_id("<x>") == 291
    tokenizer, oracle = TextTokenizer(made.json.decode()), Tokens(ranks)
    rng = random.Random(seed)
    for _ in range(200):
        text = "".join(rng.choices("abc é", k=rng.randint(1, 25)))
        assert tokenizer.encode(text) == oracle.encode(text, ["<x>"])


def test_merges_are_those_of_the_ranks() -> None:
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"zyx": 259}
    assert merges(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")]  # zyx is never reached


def test_a_token_that_no_merge_reaches_is_still_a_word() -> None:
    ranks = {bytes([b]): b for b in range(256)} | {b"zyx": 256}
    reference = ByteReference(ranks, {})
    assert reference.encode("zyx") == [256]
    assert reference.encode("zyxz") == list(b"zyxz")


# --- refusals -------------------------------------------------------------------------------------

WHOLE = [(bytes([b]), b) for b in range(256)]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (WHOLE[:-1], "no token of the byte 0xff"),
        ([*WHOLE, (b"ab", 300)], "257 tokens"),
        ([*WHOLE, (b"ab", 255)], "257 tokens"),
    ],
)
def test_ranks_that_are_not(tmp_path: Path, lines: list[tuple[bytes, int]], found: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        read_ranks(write(tmp_path / "some.tiktoken", lines))
    assert found in caught.value.found
    assert "some.tiktoken is damaged" in str(caught.value)


@pytest.mark.parametrize("line", [b"!!!! 3", b"YQ==", b"YQ== x", b"YQ== 1 2", b"\xff\xfe 1"])
def test_lines_that_are_not(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "some.tiktoken"
    path.write_bytes(b"YQ== 0\n" + line + b"\n")
    with pytest.raises(TokenizerError) as caught:
        read_ranks(path)
    assert "line 2" in caught.value.found


def test_a_difference_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof fails when the last of several spaces does not go to the word behind it."""
    assert r"|\s+(?!\S)" in byte_bpe.SPLIT
    monkeypatch.setattr(byte_bpe, "SPLIT", byte_bpe.SPLIT.replace(r"|\s+(?!\S)", ""))
    with pytest.raises(TokenizerError) as caught:
        convert_byte_bpe(VOCABULARY, SPECIALS)
    assert "is not equal to the ranks of qwen.tiktoken" in str(caught.value)


def test_ids_that_another_file_names() -> None:
    made = convert_byte_bpe(VOCABULARY, SPECIALS)
    expect_ids(made, {"<img>": 726, "</img>": 727}, Path("config.json"))
    for wanted, found in (({"<img>": 7}, "'<img>' is 726"), ({"<nix>": 7}, "'<nix>' is unknown")):
        with pytest.raises(TokenizerError) as caught:
            expect_ids(made, wanted, Path("config.json"))
        assert caught.value.found == found
        assert "config.json" in str(caught.value)
