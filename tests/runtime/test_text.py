from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import examples
from vlmforge.errors import EngineFormatError, PromptError
from vlmforge.inputs.tokenizer import KEEP_VALID_BYTES, TextTokenizer
from vlmforge.outputs.detokenizer import IncrementalDetokenizer

SOURCE = Path(__file__).parents[1] / "data/llava_1_5_hf/checkpoint/tokenizer.json"
BYTE_0, IMAGE, SPACE, EOS = 3, 640, 497, 2


def source() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(SOURCE.read_text("utf-8"))
    return data


def byte_level_json() -> str:
    """A byte-level tokenizer whose tokens end in the middle of characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    merges = [("ð", "Ł"), ("Ĳ", "Ģ"), ("Ġ", "a"), ("Ã", "©")]
    vocab |= {"".join(pair): len(vocab) + place for place, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|im|>"])
    text: str = tokenizer.to_str()
    return text


@cache
def tokenizer(kind: str) -> TextTokenizer:
    if kind == "byte_level":
        return TextTokenizer(byte_level_json())
    data = source()
    if kind == "keep_valid":
        data["decoder"]["decoders"][1]["invalid_run"] = KEEP_VALID_BYTES
    return TextTokenizer(json.dumps(data))


KINDS = ["byte_runs", "keep_valid", "byte_level"]


def byte_ids(text: str) -> list[int]:
    return [BYTE_0 + byte for byte in text.encode()]


# --- encoding -----------------------------------------------------------------------------------


def test_special_tokens_are_recognised_and_none_added() -> None:
    ids = tokenizer("byte_runs").encode("a<image></s>")
    assert ids[-2:] == [IMAGE, EOS]
    assert 1 not in ids


def test_encode_plain_takes_special_tokens_as_text() -> None:
    ours = tokenizer("byte_runs")
    text = "a<image></s> <s>"
    ids = ours.encode_plain(text)
    assert not set(ids) & set(ours.special_tokens.values())
    assert ours.decode(ids) == text
    # The other way is not touched.
    assert IMAGE in ours.encode(text)


def test_encode_plain_takes_added_tokens_that_are_not_special_as_text_too() -> None:
    data = source()
    data["added_tokens"][3]["special"] = False
    ours = TextTokenizer(json.dumps(data))
    assert ours.encode("<image>") == [IMAGE]
    assert IMAGE not in ours.encode_plain("<image>")


def test_saved_truncation_and_padding_do_not_apply() -> None:
    data = source()
    data["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    data["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 641,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    ours = TextTokenizer(json.dumps(data))
    for text in ("", "a", "far more than two or nine tokens of text are here"):
        assert ours.encode(text) == tokenizer("byte_runs").encode(text)
        assert ours.encode_plain(text) == tokenizer("byte_runs").encode_plain(text)


def test_a_lone_surrogate_is_a_prompt_error() -> None:
    with pytest.raises(PromptError, match="lone surrogate") as caught:
        tokenizer("byte_runs").encode("ab\ud83dc")
    assert caught.value.found == "'\\ud83d' at position 2"


def test_lookups() -> None:
    ours = tokenizer("byte_runs")
    assert ours.vocab_size == 642
    assert (ours.token_id("<image>"), ours.id_token(IMAGE)) == (IMAGE, "<image>")
    assert (ours.token_id("no such token"), ours.id_token(642)) == (None, None)
    assert dict(ours.special_tokens) == {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "<image>": 640,
        "<pad>": 641,
    }


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"added_tokens": 3}', '{"model": {}}'])
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(EngineFormatError, match=r"tokenizer\.json cannot be read"):
        TextTokenizer(text)


# --- decoding -----------------------------------------------------------------------------------


@settings(max_examples=examples(200))
@given(st.lists(st.integers(0, 641), max_size=30), st.booleans())
def test_decoding_is_that_of_transformers(ids: list[int], skip: bool) -> None:
    theirs = _transformers().decode(
        ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    ours = tokenizer("byte_runs").decode(
        ids, skip_special_tokens=skip, spaces_between_special_tokens=False
    )
    assert ours == theirs


@cache
def _transformers() -> Any:
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_file=str(SOURCE))


@given(st.binary(max_size=20))
def test_each_invalid_byte_is_one_replacement_character(data: bytes) -> None:
    """Python replaces the longest beginning of a character by one U+FFFD, so count the bytes."""
    ids = [BYTE_0 + byte for byte in data]
    expected, rest = "", data
    while rest:
        try:
            expected, rest = expected + rest.decode(), b""
        except UnicodeDecodeError as error:
            expected += rest[: error.start].decode() + "\ufffd"
            rest = rest[error.start + 1 :]
    assert tokenizer("keep_valid").decode([SPACE + 1, *ids])[1:] == expected


def test_bytes_that_are_not_utf8() -> None:
    ids = [*byte_ids("é"), BYTE_0 + 0xC3]
    assert tokenizer("byte_runs").decode(ids) == "\ufffd\ufffd\ufffd"
    assert tokenizer("keep_valid").decode(ids) == "é\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_vocabulary_have_no_text(kind: str) -> None:
    ours = tokenizer(kind)
    ids = ours.encode("a b")
    assert ours.decode([700, *ids[:1], 10**6, *ids[1:], -1]) == ours.decode(ids)
    assert ours.decode([700]) == ours.decode([]) == ""


def test_spaces_around_special_tokens() -> None:
    ours = tokenizer("byte_runs")
    a, spaced = ours.encode("xa")[-1], ours.token_id("▁a")
    assert spaced is not None

    def shown(ids: list[int], spaces: bool) -> str:
        return ours.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=spaces)

    ids = [1, a, IMAGE, IMAGE, spaced, EOS]
    assert shown(ids, True) == "<s> a <image> <image> a </s>"
    assert shown(ids, False) == "<s>a<image><image> a</s>"
    assert ours.decode(ids) == "a a"


# --- as it is generated -------------------------------------------------------------------------

INTERESTING = [
    *byte_ids("é图😀"),
    *(BYTE_0 + byte for byte in (0x00, 0x20, 0x41, 0x80, 0xBF, 0xF0, 0xFF)),
    *(0, 1, EOS, IMAGE, 641, 642, 700),
    *(259, SPACE, SPACE + 1, 261, 577),
]
IDS = st.lists(st.sampled_from(INTERESTING) | st.integers(0, 720), max_size=40)


@settings(max_examples=examples(1000))
@given(
    st.sampled_from(KINDS),
    IDS,
    st.lists(st.integers(0, 40), max_size=5),
    st.booleans(),
    st.booleans(),
)
def test_pieces_are_the_text_of_all_ids(
    kind: str, ids: list[int], cuts: list[int], skip: bool, spaces: bool
) -> None:
    ours = tokenizer(kind)
    if kind == "byte_level":
        ids = [token % (ours.vocab_size + 1) for token in ids]
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(ids)), len(ids)]
    chunks = [ids[a:b] for a, b in pairwise(bounds)]
    expected = ours.decode(ids, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
    for split in (chunks, [[token] for token in ids]):
        detokenizer = IncrementalDetokenizer(
            ours, skip_special_tokens=skip, spaces_between_special_tokens=spaces
        )
        text = ""
        for chunk in split:
            text += detokenizer.push(chunk)
            assert expected.startswith(text)
        assert text + detokenizer.finish() == expected
        assert detokenizer.finish() == ""


def test_a_token_without_text_is_no_context() -> None:
    """The decoder strips the first space of what it gets, so the context must have text."""
    data = source()
    vocab = data["model"]["vocab"]
    vocab[""] = vocab.pop("图")
    ours = TextTokenizer(json.dumps(data))
    ids = [SPACE + 1, *[vocab[""]] * 20, SPACE, SPACE + 1]
    detokenizer = IncrementalDetokenizer(ours)
    text = "".join([detokenizer.push([token]) for token in ids])
    assert text + detokenizer.finish() == ours.decode(ids) == "e e"


@pytest.mark.parametrize("kind", KINDS)
def test_no_half_character_is_given_out(kind: str) -> None:
    ours = tokenizer(kind)
    text = "a é 图 👩‍👩‍👧 b"
    detokenizer = IncrementalDetokenizer(ours)
    pieces = [detokenizer.push([token]) for token in ours.encode(text)]
    assert "".join(pieces) + detokenizer.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_given_out_with_its_last_byte() -> None:
    detokenizer = IncrementalDetokenizer(tokenizer("keep_valid"))
    assert [detokenizer.push([token]) for token in byte_ids("é😀")] == ["", "é", "", "", "", "😀"]


def test_byte_runs_wait_for_their_end() -> None:
    """In such a tokenizer one bad byte changes the text of the bytes before it."""
    detokenizer = IncrementalDetokenizer(tokenizer("byte_runs"))
    assert [detokenizer.push([token]) for token in [*byte_ids("é"), IMAGE, SPACE + 1]] == [
        "",
        "",
        "",
        tokenizer("byte_runs").decode([*byte_ids("é"), SPACE + 1]),
    ]


class _Counting(TextTokenizer):
    joined = 0

    def join(self, tokens: Any) -> str:
        self.joined += len(tokens)
        return super().join(tokens)


@pytest.mark.parametrize(
    "ids",
    [
        [SPACE + 1],
        [SPACE],
        byte_ids("图"),
        [BYTE_0 + 0xFF],
        [BYTE_0 + 0xE5, BYTE_0 + 0x9B],
        [IMAGE, 700],
        [SPACE, BYTE_0 + 0xF0, IMAGE],
    ],
)
@pytest.mark.parametrize("kind", ["byte_runs", "keep_valid"])
def test_the_work_for_a_token_does_not_grow(kind: str, ids: list[int]) -> None:
    def work(repeats: int) -> int:
        ours = _Counting(tokenizer(kind).json)
        detokenizer = IncrementalDetokenizer(ours, skip_special_tokens=False)
        for token in ids * repeats:
            detokenizer.push([token])
        detokenizer.finish()
        return ours.joined

    assert work(400) <= 2.2 * work(200)
