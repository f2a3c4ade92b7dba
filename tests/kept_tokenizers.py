"""Tokenizers kept for a run: equal files are converted, and proved equal to the original, once.

The suite builds a few tokenizers some hundred times, and a proof takes as long as all the rest of
a tiny build whose graphs are there. What is kept is known by all that the conversion reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmforge_builder.tokenizer import byte_bpe, convert
from vlmforge_builder.tokenizer.byte_bpe import SpecialTokens
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer
from vlmforge_builder.tokenizer.files import TokenizerFiles
from vlmforge_recipes.qwen_vl import prompting

_kept: dict[object, ConvertedTokenizer] = {}
_from_sentencepiece, _from_ranks = convert._converted, prompting.convert_byte_bpe


def _once(key: object, make: Callable[[], ConvertedTokenizer]) -> ConvertedTokenizer:
    how = (convert.prove, byte_bpe.prove, key)  # some tests put others in their place
    if how not in _kept:
        _kept[how] = make()
    return _kept[how]


def _converted(files: TokenizerFiles, model: Any, *given: Any, **named: Any) -> ConvertedTokenizer:
    said = json.dumps((files.config, files.special_map, files.added))
    key = (model.data, model.file.name, said, given, *sorted(named.items()))
    return _once(key, lambda: _from_sentencepiece(files, model, *given, **named))


def _converted_ranks(path: Path, specials: SpecialTokens) -> ConvertedTokenizer:
    key = (path.read_bytes(), path.name, *specials.texts, specials.hidden, *specials.stops)
    return _once(key, lambda: _from_ranks(path, specials))


def remember_tokenizers() -> None:
    """Every build of this process keeps its tokenizers; once is enough."""
    convert._converted = _converted
    prompting.convert_byte_bpe = _converted_ranks
