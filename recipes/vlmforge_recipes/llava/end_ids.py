"""The ids that end an answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer

_KEY = "eos_token_id"


def with_end_ids(
    tokenizer: ConvertedTokenizer, checkpoint: Path, text: ConfigReader
) -> ConvertedTokenizer:
    """The tokenizer with the ids at which `generate` stops in both layouts.

    They are those of generation_config.json, or else of the decoder's configuration. The tokenizer
    is asked last: the fast one of v1.6 34B calls another token its end.

    Raises:
        CheckpointError: an id that is no whole number, or out of range.
    """
    places = [text]
    if (path := checkpoint / "generation_config.json").exists():
        places.insert(0, read_config(path))
    for place in places:
        if place.has(_KEY):
            return dataclasses.replace(tokenizer, eos_ids=_ids(place))
    return tokenizer


def _ids(config: ConfigReader) -> tuple[int, ...]:
    value = config.get(_KEY)
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(type(token) is int and token in limits.TOKEN for token in ids):
        raise CheckpointError(
            f"{config.file} has a wrong {_KEY}.",
            found=repr(value)[:80],
            expected="a token id, or a list of them",
            fix=f"check {config.file.name} against the published one",
        )
    return tuple(dict.fromkeys(ids))
