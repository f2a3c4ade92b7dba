"""`tokenizer.json`, read as what a stranger wrote: its work is bounded, and its faults are typed.

The `tokenizers` library runs its regular expressions by backtracking, and panics when they take too
long (pyo3's PanicException, which is no `Exception`). So only known expressions are run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vlmforge.errors import EngineFormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_EXPRESSIONS = frozenset(
    {
        # Of byte-level tokenizers: the first one published, and those that know capitals; they
        # differ in how many digits are one word.
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        *(f"{_WORDS}|{digits}|{_REST}" for digits in (r"\p{N}", r"\p{N}{1,3}")),
        # What build-engine writes for SentencePiece models that strip spaces; the last one is that
        # of older engines, whose work grows with the square of a run of this one character.
        r"\A +",
        r" {2,}",
        "(?<!\u2581)\u2581+\\z",
        "\u2581+\\z",
    }
)
"""The regular expressions that a tokenizer may have."""

_MOST_STEPS = 32
_MOST_GROWTH = 16
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_TRAITS = {"id": int, "content": str, "special": bool}


def parse_tokenizer(tokenizer_json: str) -> dict[str, Any]:
    """The JSON of a tokenizer, as far as we look into it checked.

    Raises:
        EngineFormatError: not JSON, without a model or well-formed `added_tokens`, or with steps
            whose work is not bounded.
    """
    try:
        data = json.loads(tokenizer_json)
    except (ValueError, RecursionError) as error:
        raise _unusable(str(error)) from error
    if not isinstance(data, dict) or not isinstance(data.setdefault("added_tokens", []), list):
        raise _unusable(f"a {type(data).__name__} without a list of added_tokens")
    if not isinstance(data.get("model"), dict):
        raise _unusable("no model")
    for token in data["added_tokens"]:
        if not _is_token(token):
            raise _unusable(f"the added token {ascii(token)[:100]}")
    if fault := unbounded_work(data):
        raise _unusable(fault, "steps whose work is bounded, with regular expressions that we know")
    return data


def _is_token(token: object) -> bool:
    """Whether it has an id that fits 32 bits, a content, and says if it is special."""
    if not isinstance(token, dict):
        return False
    typed = all(type(token.get(name)) is kind for name, kind in _TRAITS.items())
    return typed and 0 <= token["id"] < 1 << 32


def unbounded_work(data: dict[str, Any]) -> str:
    """What in a tokenizer's description could make a text cost without bound; "" if nothing.

    Those are regular expressions other than `KNOWN_EXPRESSIONS`, empty patterns, and long chains of
    steps that each make a text longer.
    """
    for part in _PARTS:
        steps = list(_steps(data.get(part)))
        if len(steps) > _MOST_STEPS:
            return f"{len(steps)} steps in its {part}; at most {_MOST_STEPS}"
        for step in steps:
            if fault := _pattern_fault(step):
                return f"{fault} in its {part}"
        growth = math.prod(_growth(step) for step in steps)
        if growth > _MOST_GROWTH:
            return f"a {part} that makes texts {growth:.0f} times as long; at most {_MOST_GROWTH}"
    return ""


def _steps(described: object) -> Iterator[dict[str, Any]]:
    """All objects with a type in a description, however they are nested."""
    left = [described]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            if "type" in item:
                yield item
            left += item.values()
        elif isinstance(item, list):
            left += item


def _pattern_fault(step: dict[str, Any]) -> str:
    pattern = step.get("pattern")
    if not isinstance(pattern, dict):
        return ""
    if "Regex" in pattern and pattern["Regex"] not in KNOWN_EXPRESSIONS:
        return f"the unknown regular expression {ascii(pattern['Regex'])[:100]}"
    return "an empty pattern" if pattern.get("String") == "" else ""


def _growth(step: dict[str, Any]) -> float:
    """How much longer a step can make a text."""
    content, pattern = step.get("content"), step.get("pattern")
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0
    shortest = len(pattern["String"]) if isinstance(pattern.get("String"), str) else 1
    return max(1.0, len(content) / max(shortest, 1))


def load_tokenizer(tokenizer_json: str) -> Tokenizer:
    """The tokenizer of a text that `parse_tokenizer` accepts (EngineFormatError otherwise)."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except BaseException as error:
        raise_unless_fault(error)
        raise _unusable(str(error)) from error
    # A tokenizer saved while these were on would cut and pad every prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Each thread would remember words, which are whole prompts where a tokenizer does not split
    # them: 8 KB each, ten thousand of them. Looking for their tokens anew takes as long.
    if (resize := getattr(tokenizer.model, "_resize_cache", None)) is not None:
        resize(0)
    return tokenizer


def raise_unless_fault(error: BaseException) -> None:
    """Raise `error` unless it is the library's: a bare Exception, or the panic of its Rust code."""
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error


def _unusable(
    found: str, expected: str = "a tokenizer in the format of the tokenizers library"
) -> EngineFormatError:
    return EngineFormatError(
        "tokenizer.json cannot be read.",
        found=found,
        expected=expected,
        fix="build the engine again, and check that the tokenizers package is of a recent version",
    )
