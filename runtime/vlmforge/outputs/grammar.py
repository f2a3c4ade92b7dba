"""Answers that are held to a form: a JSON schema, any JSON object, a regular expression, a choice.

At every step the tokens that cannot lead to such an answer are masked. The grammars are those of
llguidance (https://github.com/guidance-ai/llguidance), which is an extra: `vlmforge[guided]`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.errors import ConfigError, EngineError
from vlmforge.field_rules import shown

# What json.dumps writes. With white space of its own choice, a model could go on for ever.
_JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_FORMS = (
    "{'type': 'json_schema', 'json_schema': {'schema': {...}}}, {'type': 'json_object'}, "
    "{'type': 'regex', 'regex': str}, {'type': 'choice', 'choice': [str, ...]} or {'type': 'text'}"
)


class Matcher:
    """Follows one answer."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool `[vocab_size]`; end tokens where the answer is whole.

        Raises:
            EngineError: the library gave up, because the grammar became too large.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._vocab_size].astype(np.bool_)

    def accept(self, token: int) -> None:
        """The token that was chosen among those."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(
                "The answer could not be held to its response_format.",
                found=str(self._matcher.get_error()).splitlines()[0],
                expected="a grammar that can be followed to its end",
                fix="make the schema or expression simpler",
            )


class Guide(Struct, frozen=True):
    """A checked grammar for one engine; each answer has a matcher of its own."""

    matcher: Callable[[], Matcher]


class Guides:
    """Makes guides for one engine.

    Args:
        tokenizer_json: Its tokenizer.
        vocab_size: Number of logits of a step.
        eos_ids: Tokens that end an answer.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._json, self._vocab_size, self._eos_ids = tokenizer_json, vocab_size, list(eos_ids)

    def guide(self, response_format: Mapping[str, object]) -> Guide | None:
        """The guide of a `GenerationConfig.response_format`; None: any text.

        Raises:
            ConfigError: an unknown form, a schema or expression that is malformed or has something
                that is not supported, no end token, or llguidance is not installed.
        """
        kind = response_format.get("type")
        if kind == "text":
            return None
        library = _library()
        grammar = _grammar(library, response_format)
        if not self._eos_ids:
            raise ConfigError(
                "response_format needs a model with an end token.",
                found="an engine without eos ids",
                expected="an end token, which closes the answer when it is whole",
                fix="leave response_format out",
            )
        failed, messages = library.LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokenizer
        )
        # A warning says that a part of the schema will not be held to: that is no less an error.
        if failed or messages:
            raise _refused(str(kind), "; ".join(messages))

        def matcher() -> Matcher:
            return Matcher(library.LLMatcher(self._tokenizer, grammar), self._vocab_size)

        return Guide(matcher)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return _library().LLTokenizer(self._json, n_vocab=self._vocab_size, eos_token=self._eos_ids)


def check_form(response_format: Mapping[str, object]) -> None:
    """Whether a `response_format` is of a known form (ConfigError), without an engine."""
    kind = response_format.get("type")
    if kind == "json_schema":
        _schema(response_format)
    elif kind in ("regex", "regex_schema"):
        _text(response_format, str(kind))
    elif kind == "choice":
        _choices(response_format)
    elif kind not in ("json_object", "text"):
        raise _unknown(response_format)


def _grammar(library: Any, response_format: Mapping[str, object]) -> str:
    check_form(response_format)
    make, kind = library.LLMatcher, response_format["type"]
    if kind in ("regex", "regex_schema"):
        return str(make.grammar_from_regex(_text(response_format, str(kind))))
    if kind == "choice":
        choices = " | ".join(
            json.dumps(text, ensure_ascii=False) for text in _choices(response_format)
        )
        return str(make.grammar_from_lark(f"start: {choices}"))
    schema = _schema(response_format) if kind == "json_schema" else {"type": "object"}
    try:
        return str(make.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_LAYOUT))
    except (TypeError, ValueError) as error:
        raise _refused("json_schema", str(error)) from error


def _schema(response_format: Mapping[str, object]) -> Mapping[str, object]:
    given = response_format.get("json_schema")
    schema = given.get("schema") if isinstance(given, Mapping) else None
    if not isinstance(schema, Mapping):
        raise _unknown(response_format)
    return schema


def _text(response_format: Mapping[str, object], key: str) -> str:
    text = response_format.get(key)
    if not isinstance(text, str) or not text:
        raise _unknown(response_format)
    return text


def _choices(response_format: Mapping[str, object]) -> list[str]:
    given = response_format.get("choice")
    if not isinstance(given, list | tuple) or not given:
        raise _unknown(response_format)
    choices = [text for text in given if isinstance(text, str) and text]
    if len(choices) != len(given):
        raise _unknown(response_format)
    return choices


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "response_format needs a library that is not installed here.",
            found="no module llguidance",
            expected="the extra `guided`",
            fix="pip install 'vlmforge[guided]'",
        ) from None
    return llguidance


def _unknown(response_format: Mapping[str, object]) -> ConfigError:
    return ConfigError(
        "GenerationConfig: response_format is of a form that is not known.",
        found=shown(response_format),
        expected=_FORMS,
        fix="{'type': 'json_schema', 'json_schema': {'schema': {'type': 'object'}}}",
    )


def _refused(kind: str, found: str) -> ConfigError:
    return ConfigError(
        "GenerationConfig: response_format cannot be held to.",
        found=" ".join(found.split())[:300],
        expected=f"a {kind} whose every keyword is supported",
        fix="leave out what is named, or write it in other words; nothing of it would be enforced",
    )
