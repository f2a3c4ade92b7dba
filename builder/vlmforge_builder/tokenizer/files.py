"""The tokenizer files of a checkpoint, read with errors that name the file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmforge.errors import TokenizerError

_DOWNLOAD = "download the file again, and compare its size with the published one"


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a checkpoint folder says about its tokenizer.

    Attributes:
        folder: The checkpoint.
        tokenizer_json: Path of `tokenizer.json`, or None.
        sentencepiece: Path of `tokenizer.model`, or None.
        config, special_map, added: `tokenizer_config.json`, `special_tokens_map.json`,
            `added_tokens.json`; empty where there is none.
    """

    folder: Path
    tokenizer_json: Path | None
    sentencepiece: Path | None
    config: dict[str, Any]
    special_map: dict[str, Any]
    added: dict[str, Any]

    def config_flag(self, key: str, *, default: bool) -> bool:
        """A boolean of `tokenizer_config.json`; absent or null is the default."""
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise TokenizerError(
                f"{self.folder / 'tokenizer_config.json'}: {key} is not a flag.",
                found=repr(value),
                expected="true or false",
                fix=_DOWNLOAD,
            )
        return value


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the small files of `folder` and look for the large ones.

    Raises:
        TokenizerError: there is no tokenizer, or a file is not a JSON object.
    """
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model.is_file() and not fast.is_file():
        raise TokenizerError(
            f"{folder} has no tokenizer.",
            found=", ".join(sorted(path.name for path in folder.glob("*token*"))) or "no such file",
            expected="tokenizer.json or tokenizer.model",
            fix="copy it into the folder from the place where the weights came from",
        )
    return TokenizerFiles(
        folder=folder,
        tokenizer_json=fast if fast.is_file() else None,
        sentencepiece=model if model.is_file() else None,
        config=_optional_object(folder / "tokenizer_config.json"),
        special_map=_optional_object(folder / "special_tokens_map.json"),
        added=_optional_object(folder / "added_tokens.json"),
    )


def _optional_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise damaged(path, str(error), "a JSON object") from error
    if not isinstance(value, dict):
        raise damaged(path, f"a {type(value).__name__}", "a JSON object")
    return value


def damaged(path: Path, found: str, expected: str) -> TokenizerError:
    """The error for a file that cannot be read as what it should be."""
    return TokenizerError(f"{path} is damaged.", found=found, expected=expected, fix=_DOWNLOAD)
