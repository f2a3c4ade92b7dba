"""Text to token ids, and ids back to text: all at once, or as they are generated."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from msgspec import Struct

from vlmforge.errors import EngineFormatError, PromptError
from vlmforge.inputs.tokenizer_file import load_tokenizer, parse_tokenizer, raise_unless_fault

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_CHARACTERS = 1 << 22
"""The longest text that is split into tokens: far beyond every window, and seconds of work."""

KEEP_VALID_BYTES = "keep_valid"
"""Value of `invalid_run` in a ByteFallback decoder: see `TextTokenizer.join`."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
UNREADABLE = "\ufffd"


class Token(Struct, frozen=True):
    """A token's text, and whether it is special."""

    text: str
    special: bool


class TextTokenizer:
    """A tokenizer in the format of the `tokenizers` library.

    Args:
        tokenizer_json: Text of a `tokenizer.json`.
        written: How tokens are written in texts that have another spelling in it, by that.

    Raises:
        EngineFormatError: it is not one.
    """

    def __init__(
        self, tokenizer_json: str, written: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        data, self._written = parse_tokenizer(tokenizer_json), written
        self.json = tokenizer_json
        """As it was given."""
        self._tokenizer = load_tokenizer(tokenizer_json)
        self._limited: dict[frozenset[str], Tokenizer] = {}
        self.special_tokens: Mapping[str, int] = MappingProxyType(
            {token["content"]: token["id"] for token in data["added_tokens"] if token["special"]}
        )
        """Ids of the special tokens by their texts."""
        self._special_ids = frozenset(self.special_tokens.values())
        fallback = _byte_fallback(data.get("decoder"))
        self._keep_valid = fallback is not None and fallback.get("invalid_run") == KEEP_VALID_BYTES
        self.joins_byte_runs = fallback is not None and not self._keep_valid
        """Whether a byte token may still change the text of the byte tokens right before it."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model's own vocabulary may be padded to more."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`: special tokens in it are recognised, none is added.

        Raises:
            PromptError: the text has a lone surrogate, or is too long, or the tokenizer fails.
        """
        return _encode(self._tokenizer, text)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text`, whatever looks like a special token in it taken as ordinary text.

        Raises:
            PromptError: the text has a lone surrogate, or is too long, or the tokenizer fails.
        """
        return self.encode_only(text, ())

    def encode_only(self, text: str, tokens: Collection[str]) -> list[int]:
        """Ids of `text` in which no other special or added tokens than `tokens` are recognised.

        Raises:
            PromptError: the text has a lone surrogate, or is too long, or the tokenizer fails.
        """
        known = frozenset(tokens)
        if known not in self._limited:
            self._limited[known] = self._limited_to(known)
        return _encode(self._limited[known], text)

    def decode(
        self,
        ids: Iterable[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of `ids`. Ids beyond the vocabulary have none.

        Args:
            ids: Token ids.
            skip_special_tokens: Leave special tokens out.
            spaces_between_special_tokens: Put a space between a special token that is not left
                out and its neighbours, where there is none.
        """
        tokens = self.tokens(ids, skip_special_tokens=skip_special_tokens)
        if skip_special_tokens or not spaces_between_special_tokens:
            return self.join([token.text for token in tokens])
        spacing = Spacing()
        return "".join(spacing.place(*segment) for segment in self._segments(tokens))

    def token_id(self, token: str) -> int | None:
        """Id of the token that is spelled `token`."""
        return self._tokenizer.token_to_id(token)

    def id_token(self, token_id: int) -> str | None:
        """Spelling of a token (not its text), None beyond the vocabulary."""
        return self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None

    def tokens(self, ids: Iterable[int], *, skip_special_tokens: bool) -> list[Token]:
        """The tokens of `ids` that may have text."""
        found = []
        for token_id in map(int, ids):
            special = token_id in self._special_ids
            spelling = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
            if spelling is not None and not (special and skip_special_tokens):
                found.append(Token(self._written.get(spelling, spelling), special))
        return found

    def join(self, tokens: Sequence[str]) -> str:
        """Text of tokens, given by their spellings.

        What a run of byte tokens that is not valid UTF-8 becomes depends on the original that the
        tokenizer was made from. The `tokenizers` library shows U+FFFD for each byte of the run;
        SentencePiece, marked by `"invalid_run": "keep_valid"`, for each invalid byte.
        """
        if self._keep_valid:
            tokens = _mend_bytes(tokens)
        decoder = self._tokenizer.decoder
        if decoder is None:
            return " ".join(tokens)
        try:
            text: str = decoder.decode(list(tokens))
        except BaseException as error:
            raise_unless_fault(error)
            raise EngineFormatError(
                "The engine's tokenizer cannot make text of its tokens.",
                found=f"{error}, of {list(tokens[:5])!a}",
                expected="a decoder in tokenizer.json that takes all tokens",
                fix="build the engine again from a checkpoint with its published tokenizer",
            ) from error
        return text

    def _segments(self, tokens: Sequence[Token]) -> Iterable[tuple[str, bool]]:
        """Special tokens, and the runs of text between them: (text, is special)."""
        before: list[str] = []  # the special token that a run follows is part of its context
        run: list[str] = []
        for token in tokens:
            if not token.special:
                run.append(token.text)
                continue
            yield self._after(before, run), False
            before, run = [token.text], []
            yield self.join(before), True
        yield self._after(before, run), False

    def _after(self, before: Sequence[str], run: Sequence[str]) -> str:
        return self.join([*before, *run])[len(self.join(before)) :] if run else ""

    def _limited_to(self, known: frozenset[str]) -> Tokenizer:
        data = parse_tokenizer(self.json)
        for token in data["added_tokens"]:
            token["special"] = token["content"] not in known
        tokenizer = load_tokenizer(json.dumps(data, ensure_ascii=False))
        tokenizer.encode_special_tokens = True
        return tokenizer


class Spacing:
    """Puts a space between special tokens and their neighbours, where there is none."""

    def __init__(self) -> None:
        self._last = ""
        self._special = False

    def place(self, text: str, special: bool) -> str:
        """`text`, which follows all text placed before, with a space before it if it needs one."""
        if not text:
            return ""
        touching = self._last not in ("", " ") and text[0] != " "
        gap = " " if touching and (special or self._special) else ""
        self._last, self._special = text[-1], special
        return gap + text


def _mend_bytes(tokens: Sequence[str]) -> list[str]:
    """`tokens`, those of bytes that are no part of a UTF-8 character replaced by U+FFFD."""
    if "<0x" not in "".join(tokens):  # mostly
        return list(tokens)
    mended: list[str] = []
    run: list[str] = []
    for token in tokens:
        if BYTE_TOKEN.fullmatch(token):
            run.append(token)
            continue
        mended += [*_mend_run(run), token]
        run = []
    return mended + _mend_run(run)


def _mend_run(run: Sequence[str]) -> list[str]:
    data = bytes(int(token[3:5], 16) for token in run)
    mended: list[str] = []
    while len(mended) < len(run):
        start = len(mended)
        length = next((n for n in range(1, 5) if _is_character(data[start : start + n])), 0)
        mended += run[start : start + length] if length else [UNREADABLE]
    return mended


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            "The text has a lone surrogate, which is not a character.",
            found=ascii(text[error.start : error.end]) + f" at position {error.start}",
            expected="text that can be written as UTF-8",
            fix="decode the text with errors='replace' where it is read",
        ) from None
    if len(text) > MAX_CHARACTERS:
        raise PromptError(
            "The text is too long to be split into tokens.",
            found=f"{len(text)} characters",
            expected=f"at most {MAX_CHARACTERS}",
            fix="send a shorter text",
        )
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except BaseException as error:
        raise_unless_fault(error)
        raise PromptError(
            "The engine's tokenizer fails on this text.",
            found=f"{error}, on {len(text)} characters that begin with {text[:40]!a}",
            expected="ids of its tokens",
            fix="change the text; if it fails on others too, build the engine again",
        ) from error
    return ids


def _byte_fallback(decoder: object) -> Mapping[str, object] | None:
    """The ByteFallback in a decoder's description."""
    if not isinstance(decoder, dict):
        return None
    if decoder.get("type") == "ByteFallback":
        return decoder
    steps = decoder.get("decoders")
    nested = steps if isinstance(steps, list) else []
    return next((found for step in nested if (found := _byte_fallback(step)) is not None), None)
