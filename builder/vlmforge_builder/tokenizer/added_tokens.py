"""The special and added tokens that a checkpoint's tokenizer files describe.

Follows how transformers 4.37 loads its Python ("slow") tokenizers, which the original
implementations use: `added_tokens_decoder` of tokenizer_config.json, where there is one, makes
added_tokens.json and special_tokens_map.json irrelevant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlmforge.errors import TokenizerError
from vlmforge_builder.tokenizer.files import TokenizerFiles

# In the order in which transformers gives ids to those that the model lacks.
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_TRAITS = ("special", "lstrip", "rstrip", "normalized", "single_word")
_DEFAULTS = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is cut out of the text before the rest is tokenised.

    Attributes:
        text: Its spelling.
        id: Its id.
        special: Left out of decoded text.
        lstrip, rstrip: Takes the white space before / after it along.
        normalized: Looked for in normalised text; only in a tokenizer.json.
    """

    text: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """All added tokens, in order of id, and which of them have a role.

    Attributes:
        tokens: In order of id.
        roles: Texts of the tokens by role: "bos", "eos", "unk", "pad", ...
        named_special: Texts of the tokens with a role and of the additional special tokens.
    """

    tokens: tuple[AddedToken, ...]
    roles: Mapping[str, str]
    named_special: frozenset[str]


def read_added_tokens(files: TokenizerFiles, pieces: Mapping[str, int]) -> AddedTokens:
    """Resolve the added tokens of a tokenizer with a vocabulary of `pieces`.

    Raises:
        TokenizerError: ids that clash, or a description that is not understood.
    """
    roles = {**_DEFAULTS, **_given_roles(files)}
    texts = {role: text for role in _ROLES if (text := roles.get(role)) is not None}
    named = list(dict.fromkeys([*texts.values(), *_additional(files)]))
    tokens = declared_tokens(files)
    tokens += _missing(named, tokens, pieces)
    tokens = [replace(token, special=token.special or token.text in named) for token in tokens]
    tokens.sort(key=lambda token: token.id)
    _check_clashes(files, tokens, pieces)
    return AddedTokens(tuple(tokens), texts, frozenset(named))


def declared_tokens(files: TokenizerFiles) -> list[AddedToken]:
    """The added tokens to which the files give an id (TokenizerError if not understood)."""
    if described := _decoder(files):
        return [_described(files, index, token) for index, token in described.items()]
    return [AddedToken(text, _index(files, index)) for text, index in files.added.items()]


def declared_roles(files: TokenizerFiles) -> dict[str, str]:
    """Texts of the tokens to which the files give a role (TokenizerError if not understood)."""
    return {role: text for role, text in _given_roles(files).items() if text is not None}


def named_tokens(files: TokenizerFiles) -> tuple[str, ...]:
    """Texts of all tokens that the files call special (TokenizerError if not understood).

    transformers makes each of them a special token, known to a tokenizer.json or not.
    """
    extra = files.config.get("extra_special_tokens") or ()
    named = extra.values() if isinstance(extra, dict) else extra
    if not isinstance(extra, dict | list | tuple):
        raise _not_understood(files, f"extra_special_tokens {extra!r}", "an object or a list")
    models = {name: files.config[name] for name in ("image_token",) if files.config.get(name)}
    texts = [*declared_roles(files).values(), *_additional(files)]
    return tuple(dict.fromkeys([*texts, *(_text(files, t) for t in (*named, *models.values()))]))


def _additional(files: TokenizerFiles) -> list[str]:
    key = "additional_special_tokens"
    tokens = _settings(files).get(key) or []
    if not isinstance(tokens, list):
        raise _not_understood(files, f"{key} {tokens!r}", "a list of tokens")
    return [_text(files, token) for token in tokens]


def _decoder(files: TokenizerFiles) -> Mapping[str, object]:
    described = files.config.get("added_tokens_decoder") or {}
    if not isinstance(described, dict):
        found = f"added_tokens_decoder {type(described).__name__}"
        raise _not_understood(files, found, "an object of tokens by id")
    return described


def _settings(files: TokenizerFiles) -> Mapping[str, Any]:
    if _decoder(files):
        return files.config
    return {**files.config, **files.special_map}


def _given_roles(files: TokenizerFiles) -> dict[str, str | None]:
    settings = _settings(files)
    given = {role: settings[f"{role}_token"] for role in _ROLES if f"{role}_token" in settings}
    return {role: None if value is None else _text(files, value) for role, value in given.items()}


def _text(files: TokenizerFiles, token: object) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise _not_understood(files, repr(token), "a token: its text, or an object with `content`")
    return text


def _index(files: TokenizerFiles, index: object) -> int:
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise _not_understood(files, f"id {index!r}", "a whole number >= 0 as id")
    return index


def _described(files: TokenizerFiles, index: str, token: object) -> AddedToken:
    text = _text(files, token)
    if not index.isascii() or not index.isdigit():
        raise _not_understood(files, f"id {index!r} of {text!r}", "a whole number >= 0 as id")
    traits = token if isinstance(token, dict) else {}
    for name, value in traits.items():
        if name not in _TRAITS and name not in ("content", "__type"):
            expected = "tokens with " + ", ".join(_TRAITS)
            raise _not_understood(files, f"{text!r} with {name}", expected)
        if name in _TRAITS and not isinstance(value, bool):
            raise _not_understood(files, f"{name} {value!r} of {text!r}", "true or false")
    if traits.get("single_word"):
        raise _not_understood(files, f"{text!r} with single_word", "tokens without single_word")
    return AddedToken(
        text,
        int(index),
        special=traits.get("special", False),
        lstrip=traits.get("lstrip", False),
        rstrip=traits.get("rstrip", False),
        normalized=traits.get("normalized", not traits.get("special", False)),
    )


def _missing(
    named: Iterable[str], tokens: Iterable[AddedToken], pieces: Mapping[str, int]
) -> list[AddedToken]:
    """Named tokens that are not described: pieces, or new ones behind all the others."""
    known = {token.text for token in tokens}
    following = len(pieces.keys() | known)
    added = []
    for text in named:
        if text in known:
            continue
        index = pieces.get(text, following)
        following += text not in pieces
        added.append(AddedToken(text, index, special=True))
    return added


def _check_clashes(
    files: TokenizerFiles, tokens: Iterable[AddedToken], pieces: Mapping[str, int]
) -> None:
    by_id = {index: text for text, index in pieces.items()}
    for token in tokens:
        other = by_id.setdefault(token.id, token.text)
        if other != token.text or pieces.get(token.text, token.id) != token.id:
            raise _not_understood(
                files,
                f"{token.text!r} as {token.id}, which is {other!r}"
                if other != token.text
                else f"{token.text!r} as {token.id} and as {pieces[token.text]}",
                "one id for each token",
            )


def _not_understood(files: TokenizerFiles, found: str, expected: str) -> TokenizerError:
    return TokenizerError(
        f"The added tokens of {files.folder} cannot be converted.",
        found=found,
        expected=expected,
        fix="check tokenizer_config.json, added_tokens.json and special_tokens_map.json against "
        "the published ones",
    )
