"""Tokens that a checkpoint's tokenizer_config.json gives a role beyond those of all tokenizers."""

from __future__ import annotations

from pathlib import Path

from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer

# Where transformers keeps them: at the top up to 4.51, then in one of the sections.
_SECTIONS = ("extra_special_tokens", "model_specific_special_tokens")


def named_token(checkpoint: Path, tokenizer: ConvertedTokenizer, key: str, published: str) -> str:
    """The text of the token with the role `key`; without such a key the `published` one.

    Raises:
        CheckpointError: the tokenizer does not know it.
    """
    path = checkpoint / "tokenizer_config.json"
    places: list[ConfigReader] = []
    if path.exists():
        top = read_config(path)
        places = [top, *(top.section(s) for s in _SECTIONS if isinstance(top.get(s), dict))]
    text = next((_text(place, key) for place in places if place.has(key)), published)
    if tokenizer.token_id(text) is None:
        raise CheckpointError(
            f"The tokenizer of {checkpoint} lacks a token that prompts with images need.",
            found=f"no token {text!r} ({key})",
            expected="an added token of that text",
            fix="download the tokenizer's files again",
        )
    return text


def _text(place: ConfigReader, key: str) -> str:
    value = place.get(key)
    return place.section(key).str("content") if isinstance(value, dict) else place.str(key)


def image_token_id(
    config: ConfigReader, tokenizer: ConvertedTokenizer, placeholder: str, default: int
) -> int:
    """`image_token_id` of config.json, which the tokenizer must agree to (CheckpointError)."""
    given, known = config.int("image_token_id", default), tokenizer.token_id(placeholder)
    if given != known:
        raise CheckpointError(
            f"{config.file} and the tokenizer disagree about the image token.",
            found=f"image_token_id {given}, but {placeholder!r} is token {known}",
            expected="one id",
            fix="check that the tokenizer files belong to this checkpoint",
        )
    return given
