from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from sentencepiece_models import edited, given_folder, given_json, trained, write_checkpoint
from vlmforge.errors import TokenizerError
from vlmforge_builder.tokenizer.convert import convert_tokenizer
from vlmforge_builder.tokenizer.corpus import overlapping_texts
from vlmforge_builder.tokenizer.proof import prove

DATA = Path(__file__).parents[1] / "data"


def refusal(folder: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        convert_tokenizer(folder)
    assert caught.value.found
    assert caught.value.expected
    assert caught.value.fix
    return str(caught.value)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    text = refusal(tmp_path)
    assert f"{tmp_path} has no tokenizer" in text
    assert "tokenizer_config.json" in text
    assert "tokenizer.json or tokenizer.model" in text


@pytest.mark.parametrize("content", [b"", b"not a model", trained()[:-1], trained()[:2000]])
def test_a_damaged_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    text = refusal(tmp_path)
    assert "tokenizer.model is damaged" in text
    assert f"{len(content)} bytes" in text


@pytest.mark.parametrize("content", [b"{", b"{}", b"\xff\xfe", b'{"model": 1}'])
def test_a_damaged_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config", "added_tokens", "special_tokens_map"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_json_beside_it(tmp_path: Path, name: str, content: str) -> None:
    write_checkpoint(tmp_path, trained())
    (tmp_path / f"{name}.json").write_text(content)
    assert f"{name}.json is damaged" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"legacy": "yes"}, "legacy is not a flag"),
        ({"add_eos_token": True}, "special tokens around a prompt"),
        ({"pad_token": 3}, "cannot be converted"),
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "id 'x'"),
        ({"added_tokens_decoder": {"2": {"content": "<a>"}}}, "'<a>' as 2, which is '</s>'"),
        ({"added_tokens_decoder": {"420": {"content": "</s>"}}}, "'</s>' as 420 and as 2"),
        ({"added_tokens_decoder": {"420": {"content": "w", "single_word": True}}}, "single_word"),
    ],
)
def test_configs_that_are_not_understood(
    tmp_path: Path, config: dict[str, object], words: str
) -> None:
    assert words in refusal(write_checkpoint(tmp_path, trained(), config))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (trained(model_type="unigram"), "type UNIGRAM"),
        (trained(normalization="nmt_nfkc"), "'nmt_nfkc'"),
        (trained(user_defined=("<|a|>",)), "user-defined pieces such as '<|a|>'"),
        (edited(trained(), type=(300, "UNUSED")), "the unused piece"),
        (edited(trained(), piece=(300, "ŵŵ")), "'ŵ', which is no piece"),
        (edited(trained(), type=(0, "NORMAL")), "0 unknown pieces"),
        (edited(trained(), type=(5, "NORMAL")), "255 byte pieces"),
    ],
)
def test_models_without_an_equal(tmp_path: Path, model: bytes, words: str) -> None:
    text = refusal(write_checkpoint(tmp_path, model))
    assert words in text
    assert "tokenizer.model" in text


def test_not_legacy_and_stripping_is_refused(tmp_path: Path) -> None:
    model = trained(remove_extra_whitespaces=True)
    assert "legacy=false" in refusal(write_checkpoint(tmp_path, model, {"legacy": False}))


def tied(*pieces: str) -> bytes:
    model = trained()
    for index, piece in enumerate(pieces, start=300):
        known = sentencepiece.SentencePieceProcessor(model_proto=model)
        assert known.piece_to_id(piece) == known.unk_id()
        model = edited(model, piece=(index, piece), score=(index, -3.0))
    return model


def test_pieces_that_tie_are_found_by_the_proof(tmp_path: Path) -> None:
    """SentencePiece merges pieces of equal score from the left, the other format by their ids."""
    text = refusal(write_checkpoint(tmp_path / "by_id", tied("nt", "in")))
    assert "is not equal to SentencePiece" in text
    convert_tokenizer(write_checkpoint(tmp_path / "from_left", tied("in", "nt")))


def test_overlapping_texts_are_of_pieces_that_tie() -> None:
    scores = {"i": 0.0, "in": -1.0, "nt": -1.0, "th": -2.0, "aa": -3.0}
    assert set(overlapping_texts(scores)) == {"int", "intt", "aaa", "aaaa"}


def test_a_plain_added_token_that_begins_a_text_is_found_by_the_proof(tmp_path: Path) -> None:
    """The original writes a lone space before it, which the other format cannot."""
    decoder = {"420": {"content": "[X]", "special": False}}
    config = {"legacy": False, "added_tokens_decoder": decoder}
    text = refusal(write_checkpoint(tmp_path, trained(), config))
    assert "[420] at token 0 of '[X]'" in text
    assert ", 420]" in text
    assert "tokenizer.model" in text


def test_a_given_tokenizer_json_that_numbers_tokens_otherwise(tmp_path: Path) -> None:
    data = given_json()
    data["added_tokens"][-1]["id"] = 700
    assert "'<pad>' is 641" in refusal(given_folder(tmp_path, data))


def test_a_config_that_knows_more_tokens_than_tokenizer_json(tmp_path: Path) -> None:
    decoder = {"642": {"content": "<late>"}}
    folder = given_folder(tmp_path, given_json(), added_tokens_decoder=decoder)
    assert "'<late>' is unknown" in refusal(folder)


def test_a_given_tokenizer_json_that_appends_eos(tmp_path: Path) -> None:
    data = given_json()
    eos = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    data["post_processor"]["single"].append(eos)
    data["post_processor"]["special_tokens"]["</s>"] = {
        "id": "</s>",
        "ids": [2],
        "tokens": ["</s>"],
    }
    assert "special tokens around a prompt" in refusal(given_folder(tmp_path, data))


def test_a_foreign_tokenizer_model_beside_tokenizer_json_does_not_matter(tmp_path: Path) -> None:
    source = DATA / "llava_1_5_hf" / "checkpoint"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    assert convert_tokenizer(tmp_path).proof.differing is None


def test_a_long_run_of_spaces_costs_no_square(tmp_path: Path) -> None:
    """With a square of the run's length this test would not end: 10 ** 11 steps."""
    (tmp_path / "tokenizer.model").write_bytes(trained(remove_extra_whitespaces=True))
    data = json.loads(convert_tokenizer(tmp_path).json)
    pattern = data["normalizer"]["normalizers"][-1]["pattern"]["Regex"]
    last = normalizers.Replace(Regex(pattern), "")
    run = "\u2581" * 300_000
    assert last.normalize_str(run + "x") == run + "x"
    assert last.normalize_str("x" + run[:5]) == "x"


@pytest.mark.parametrize("expression", ["(a+)+$", "((", ""])
def test_expressions_that_nobody_knows_are_refused(tmp_path: Path, expression: str) -> None:
    pattern = {"Regex": expression}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    folder = given_folder(tmp_path, {**given_json(), "pre_tokenizer": split})
    assert f"the unknown regular expression {expression!r}" in refusal(folder)


def test_a_tokenizer_that_panics_in_its_proof_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    with pytest.raises(TokenizerError, match="fails on a text") as caught:
        prove(encode, encode, ["a" * 40 + "b"], oracle="itself", file=Path("tokenizer.json"))
    assert "retry-limit-in-match" in caught.value.found
