"""`tokenizer.json` of a stranger: typed errors, known expressions, bounded growth, no panics."""

from __future__ import annotations

import copy
import gc
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import resident
from vlmforge.errors import EngineFormatError, PromptError
from vlmforge.inputs import tokenizer as text_module
from vlmforge.inputs import tokenizer_file
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.inputs.tokenizer_file import (
    KNOWN_EXPRESSIONS,
    load_tokenizer,
    parse_tokenizer,
    unbounded_work,
)
from vlmforge.limits import return_freed_memory
from vlmforge_builder.tokenizer.byte_bpe import SPLIT

SOURCE = Path(__file__).parents[1] / "data/llava_1_5_hf/checkpoint/tokenizer.json"
DATA: dict[str, Any] = json.loads(SOURCE.read_text("utf-8"))


def changed(**parts: object) -> str:
    return json.dumps({**copy.deepcopy(DATA), **parts})


def refused(tokenizer_json: str) -> EngineFormatError:
    with pytest.raises(EngineFormatError) as caught:
        TextTokenizer(tokenizer_json)
    assert caught.value.summary == "tokenizer.json cannot be read."
    assert caught.value.found and caught.value.expected and caught.value.fix
    return caught.value


def split(expression: str) -> dict[str, object]:
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def replace(pattern: object, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    ("part", "steps"), [("pre_tokenizer", "pretokenizers"), ("normalizer", "normalizers")]
)
@pytest.mark.parametrize("expression", ["(a+)+$", "(a|aa)+c", r"(\s*)*b", "((", "", "a"])
def test_only_known_expressions_are_run(part: str, steps: str, expression: str) -> None:
    step = split(expression) if part == "pre_tokenizer" else replace({"Regex": expression}, "")
    for described in (step, {"type": "Sequence", steps: [step]}):
        error = refused(changed(**{part: described}))
        assert error.found == f"the unknown regular expression {expression!r} in its {part}"


def test_what_build_engine_writes_is_known() -> None:
    assert SPLIT in KNOWN_EXPRESSIONS
    assert unbounded_work(DATA) == ""


@pytest.mark.parametrize("expression", sorted(KNOWN_EXPRESSIONS))
def test_known_expressions_are_ones_of_the_library(expression: str) -> None:
    ours = TextTokenizer(changed(pre_tokenizer=split(expression)))
    assert ours.decode(ours.encode("a b  c\n 12 it's")) != ""


def test_texts_cannot_be_made_ever_longer() -> None:
    steps = [replace({"String": "a"}, "a" * 10)] * 3
    error = refused(changed(normalizer={"type": "Sequence", "normalizers": steps}))
    assert error.found == "a normalizer that makes texts 1000 times as long; at most 16"
    error = refused(changed(decoder={"type": "Sequence", "decoders": steps}))
    assert "a decoder that makes texts 1000 times as long" in error.found
    error = refused(changed(normalizer=replace({"String": ""}, "x")))
    assert error.found == "an empty pattern in its normalizer"
    many = {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 40}
    assert refused(changed(normalizer=many)).found == "41 steps in its normalizer; at most 32"


@pytest.mark.parametrize(
    "token",
    [None, 1, "a", [], {}, {"id": 1}, {"id": "1", "content": "a", "special": True}]
    + [{"id": 1, "content": 2, "special": True}, {"id": 1, "content": "a"}]
    + [{"id": number, "content": "a", "special": True} for number in (-1, 2**32, 1.0, True)],
)
def test_added_tokens_are_well_formed(token: object) -> None:
    assert "the added token" in refused(changed(added_tokens=[token])).found


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\0", "{}", '{"model": 1}'])
def test_what_is_no_tokenizer_is_typed(text: str) -> None:
    refused(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = ["model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"]


@given(st.sampled_from(KEYS), JSON, st.sampled_from(["type", "vocab", "merges", "decoders", ""]))
def test_any_damage_is_a_tokenizer_or_a_typed_error(key: str, value: object, inner: str) -> None:
    data = copy.deepcopy(DATA)
    if inner and isinstance(data[key], dict):
        data[key][inner] = value
    else:
        data[key] = value
    try:
        ours = TextTokenizer(json.dumps(data))
        ours.decode(ours.encode("a <image> b"))
    except (EngineFormatError, PromptError):
        return


def test_a_panic_while_encoding_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that a known expression causes; it stands for what nobody thought of."""
    expression = "(a+)+$"
    known = KNOWN_EXPRESSIONS | {expression}
    monkeypatch.setattr(tokenizer_file, "KNOWN_EXPRESSIONS", known)
    ours = TextTokenizer(changed(pre_tokenizer=split(expression), normalizer=None))
    with pytest.raises(PromptError, match="tokenizer fails on this text") as caught:
        ours.encode("a" * 40 + "b")
    assert "retry-limit-in-match" in caught.value.found


def test_a_panic_while_decoding_is_a_typed_error() -> None:
    strip = {"type": "Strip", "content": "\u2581", "start": 0, "stop": 9}
    ours = TextTokenizer(changed(decoder=strip))
    with pytest.raises(EngineFormatError, match="cannot make text of its tokens"):
        ours.decode(ours.encode("  "))


def test_a_text_has_a_greatest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MAX_CHARACTERS", 10)
    ours = TextTokenizer(json.dumps(DATA))
    assert ours.encode("a" * 10)
    with pytest.raises(PromptError, match="too long to be split into tokens") as caught:
        ours.encode_plain("a" * 11)
    assert caught.value.found == "11 characters"


@pytest.mark.parametrize("token", [2**32, 2**64, -(2**70)])
def test_ids_that_no_tokenizer_can_have_have_no_text(token: int) -> None:
    ours = TextTokenizer(json.dumps(DATA))
    assert ours.decode([token]) == ""
    assert ours.id_token(token) is None


def test_parsing_keeps_all_that_was_there() -> None:
    assert parse_tokenizer(json.dumps(DATA)) == DATA


def test_no_text_is_remembered() -> None:
    """A server's prompts are all different: in each thread, ten thousand would stay, 8 KB each."""

    def kept() -> int:
        gc.collect()
        return_freed_memory()
        return resident()

    tokenizer = load_tokenizer(SOURCE.read_text("utf-8"))
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=200)) for _ in range(4000)]
    tokenizer.encode(texts[0])
    before = kept()
    for text in texts:
        tokenizer.encode(text)
    assert kept() - before < 8 << 20  # a quarter of that
