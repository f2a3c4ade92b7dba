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
    tokenizer: ConvertedTokenizer, checkpoint: Path, *configs: ConfigReader
) -> ConvertedTokenizer:
    """The tokenizer with the ids at which `generate` of the original stops.

    They are those of generation_config.json, or else of the first of `configs` that has any. The
    tokenizer is asked last: the fast one of LLaVA v1.6 34B calls another token its end.

    Raises:
        CheckpointError: an id that is no whole number, or out of range.
    """
    ids = next((ids for place in (*_generation(checkpoint), *configs) if (ids := _ids(place))), ())
    return dataclasses.replace(tokenizer, eos_ids=ids) if ids else tokenizer


def generation_end_ids(checkpoint: Path) -> tuple[int, ...]:
    """Those of generation_config.json; empty where it has none (errors as `with_end_ids`)."""
    return next((_ids(place) for place in _generation(checkpoint)), ())


def _generation(checkpoint: Path) -> tuple[ConfigReader, ...]:
    path = checkpoint / "generation_config.json"
    return (read_config(path),) if path.exists() else ()


def _ids(config: ConfigReader) -> tuple[int, ...]:
    if not config.has(_KEY):
        return ()
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
