"""A tokenizer.json gets the special tokens that the files beside it name, as in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import HF
from vlmforge.errors import TokenizerError
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer, convert_tokenizer

TEXT = "USER: <image> \n What is it . </s> ? do n't <pad> ASSISTANT:<s> <unk>x"
CONFIG: dict[str, Any] = json.loads((HF / "checkpoint/tokenizer_config.json").read_text("utf-8"))


def folder(tmp_path: Path, **changes: object) -> Path:
    for name in ("config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copyfile(HF / "checkpoint" / name, tmp_path / name)
    text = json.dumps({**CONFIG, **changes})
    (tmp_path / "tokenizer_config.json").write_text(text, "utf-8")
    return tmp_path


def traits(index: str, **changes: object) -> dict[str, Any]:
    decoder: dict[str, Any] = json.loads(json.dumps(CONFIG["added_tokens_decoder"]))
    decoder[index] |= changes
    return {"added_tokens_decoder": decoder}


def ours(path: Path) -> ConvertedTokenizer:
    return convert_tokenizer(path)


SAME: tuple[dict[str, Any], ...] = (
    {},
    traits("640", lstrip=True),
    traits("640", rstrip=True),
    traits("641", special=False),
    traits("641", normalized=True),
    traits("2", lstrip=True, rstrip=True),
    {"additional_special_tokens": ["ASS"]},
    {"pad_token": "<unk>", "unk_token": "<pad>"},
    {"cls_token": "it"},
    {"extra_special_tokens": {"image_token": "<image>", "more": "it"}},
    {"extra_special_tokens": ["it"]},
    {"legacy": True, "add_bos_token": False, "add_eos_token": True, "add_prefix_space": False},
    {"clean_up_tokenization_spaces": True, "spaces_between_special_tokens": True},
    {"tokenizer_class": "GPT2Tokenizer", "do_lower_case": True, "sp_model_kwargs": {"x": 1}},
)


@pytest.mark.parametrize("changes", SAME, ids=str)
def test_ids_are_those_of_transformers_or_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = folder(tmp_path, **changes)
    theirs: list[int] = AutoTokenizer.from_pretrained(path)(TEXT).input_ids
    try:
        made = ours(path)
    except TokenizerError:
        assert any(text in str(changes) for text in ("'it'", "'ASS'"))
        return
    assert made.add_bos
    assert made.bos_id is not None
    assert [made.bos_id, *made.encode(TEXT)] == theirs


def test_agreeing_files_leave_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    assert ours(folder(tmp_path)).json == (HF / "checkpoint/tokenizer.json").read_bytes()


UNKNOWN: tuple[dict[str, Any], ...] = (
    {"cls_token": "<new>"},
    {"additional_special_tokens": ["<new>"]},
    {"extra_special_tokens": {"x": "<new>"}},
    {"image_token": "<new>"},
)


@pytest.mark.parametrize("changes", UNKNOWN, ids=str)
def test_a_token_that_transformers_would_add_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(TokenizerError, match="lacks a special token") as caught:
        ours(folder(tmp_path, **changes))
    assert "'<new>'" in caught.value.found


MISTYPED: tuple[dict[str, Any], ...] = (
    {"additional_special_tokens": "abc"},
    {"additional_special_tokens": [7]},
    {"additional_special_tokens": {"a": "b"}},
    {"extra_special_tokens": "abc"},
    {"extra_special_tokens": {"x": 7}},
    {"added_tokens_decoder": [{"content": "<s>"}]},
    {"added_tokens_decoder": {"1": 7}},
    {"added_tokens_decoder": {"1": {"content": "<s>", "special": "false"}}},
    {"added_tokens_decoder": {"1": {"content": "<s>", "lstrip": 0}}},
    {"added_tokens_decoder": {"1": {"content": "<s>", "unheard_of": True}}},
    {"bos_token": 7},
    {"eos_token": ["</s>"]},
    {"pad_token": {"text": "<pad>"}},
    {"image_token": 7},
)


@pytest.mark.parametrize("changes", MISTYPED, ids=str)
def test_values_of_a_wrong_type_are_errors(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError):
        ours(folder(tmp_path, **changes))
