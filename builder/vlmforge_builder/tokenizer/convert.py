"""Any tokenizer of a checkpoint as one `tokenizer.json`, proven equal to it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from vlmforge.errors import EngineFormatError, TokenizerError
from vlmforge.inputs.tokenizer_file import load_tokenizer, parse_tokenizer
from vlmforge_builder.tokenizer.added_tokens import AddedToken as Token
from vlmforge_builder.tokenizer.added_tokens import (
    declared_roles,
    declared_tokens,
    named_tokens,
    read_added_tokens,
)
from vlmforge_builder.tokenizer.corpus import PROOF_CORPUS, piece_texts, token_texts
from vlmforge_builder.tokenizer.files import TokenizerFiles, damaged, read_tokenizer_files
from vlmforge_builder.tokenizer.proof import Encode, TokenizerProof, prove
from vlmforge_builder.tokenizer.reference import ReferenceTokenizer
from vlmforge_builder.tokenizer.sentencepiece_bpe import (
    InvalidBytes,
    SentencePieceModel,
    read_sentencepiece,
    sentencepiece_json,
)

_TRAITS = ("lstrip", "rstrip", "normalized", "special")
_SAVE_AGAIN = (
    "save the tokenizer again with transformers: AutoTokenizer.from_pretrained("
    "folder).save_pretrained(folder)"
)


@dataclass(frozen=True, slots=True)
class ConvertedTokenizer:
    """A `tokenizer.json`, and what the prompt and decode policies need to know of it.

    Attributes:
        json: Its bytes. It is used without adding special tokens: `add_bos` says if BOS is due.
        bos_id, bos_token: The begin token, or None and "".
        add_bos: The original puts BOS before every prompt.
        eos_ids: The tokenizer's end token, if it has one.
        eos_token: The tokenizer's end token, or "".
        special_ids: Tokens that decoding leaves out, ascending.
        vocab_size: Largest id + 1.
        proof: What the original was compared on.
    """

    json: bytes
    bos_id: int | None
    bos_token: str
    add_bos: bool
    eos_ids: tuple[int, ...]
    eos_token: str
    special_ids: tuple[int, ...]
    vocab_size: int
    proof: TokenizerProof

    def token_id(self, token: str) -> int | None:
        """Id of the token that is spelled `token`."""
        found: int | None = Tokenizer.from_str(self.json.decode()).token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it recognised."""
        return _encoder(Tokenizer.from_str(self.json.decode()))(text)


def convert_tokenizer(
    folder: Path,
    *,
    invalid_bytes: InvalidBytes = "keep_valid",
    prefer_model: bool = False,
    legacy: bool | None = None,
) -> ConvertedTokenizer:
    """Convert the tokenizer of the checkpoint in `folder` and prove it equal.

    A `tokenizer.json` is taken as it is. A SentencePiece `tokenizer.model` is converted.

    Args:
        folder: The checkpoint.
        prefer_model: A `tokenizer.model` is used even beside a `tokenizer.json`, which may give
            other ids: for originals that load the SentencePiece class.
        legacy: See `ReferenceTokenizer`; None: what the checkpoint says.
        invalid_bytes: How a converted tokenizer decodes byte tokens that are not UTF-8:
            "keep_valid" as originals on SentencePiece do, "whole_run" as those on the `tokenizers`
            library.

    Raises:
        TokenizerError: no tokenizer, a damaged one, one of a kind that cannot be converted, or a
            difference to the original.
    """
    files = read_tokenizer_files(folder)
    if files.tokenizer_json is not None and not (prefer_model and files.sentencepiece):
        return _given(files, files.tokenizer_json)
    assert files.sentencepiece is not None
    if legacy is None:
        legacy = files.config_flag("legacy", default=True)
    return _converted(files, read_sentencepiece(files.sentencepiece), invalid_bytes, legacy=legacy)


def _converted(
    files: TokenizerFiles, model: SentencePieceModel, invalid_bytes: InvalidBytes, *, legacy: bool
) -> ConvertedTokenizer:
    if files.config_flag("add_eos_token", default=False):
        raise _adds_more(files.folder / "tokenizer_config.json", "add_eos_token true")
    added = read_added_tokens(files, model.pieces)
    for text in named_tokens(files):
        if all(token.text != text for token in added.tokens):
            raise _lacks(model.file, text)
    data = sentencepiece_json(model, added, legacy=legacy, invalid_bytes=invalid_bytes)
    tokenizer = _load(model.file, data)
    texts = (*PROOF_CORPUS, *token_texts(_special_texts(data)))
    proof = prove(
        _encoder(tokenizer),
        ReferenceTokenizer(model.data, added, legacy=legacy).encode,
        _all_texts(model, texts),
        oracle=f"SentencePiece {model.file.name} ({'legacy' if legacy else 'not legacy'})",
        file=model.file,
    )
    return _described(
        files,
        data,
        tokenizer,
        added.roles,
        add_bos=files.config_flag("add_bos_token", default=True),
        proof=proof,
    )


def _given(files: TokenizerFiles, path: Path) -> ConvertedTokenizer:
    data = path.read_bytes()
    tokenizer = _load(path, data)
    _check_ids(files, path, data, tokenizer)
    data = _overlay(files, path, data, tokenizer)
    texts = (*PROOF_CORPUS, *token_texts(_special_texts(data)))
    encode = _encoder(tokenizer)
    again = Tokenizer.from_file(str(path))
    _overlay(files, path, path.read_bytes(), again)
    from_file = _encoder(_plain(again))
    proof = prove(encode, from_file, texts, oracle=f"the given {path.name}", file=path)
    proof = replace(proof, differing=_differing(files, encode, texts))
    roles = declared_roles(files)
    bos = _begin_token(path, tokenizer)
    if bos is not None:
        roles["bos"] = bos
    return _described(files, data, tokenizer, roles, add_bos=bos is not None, proof=proof)


def _described(
    files: TokenizerFiles,
    data: bytes,
    tokenizer: Tokenizer,
    roles: Mapping[str, str],
    *,
    add_bos: bool,
    proof: TokenizerProof,
) -> ConvertedTokenizer:
    ids = {role: tokenizer.token_to_id(text) for role, text in roles.items()}
    bos_id, eos_id = ids.get("bos"), ids.get("eos")
    added = json.loads(data).get("added_tokens", [])
    return ConvertedTokenizer(
        json=data,
        bos_id=bos_id,
        bos_token="" if bos_id is None else roles["bos"],
        add_bos=add_bos,
        eos_ids=() if eos_id is None else (eos_id,),
        eos_token="" if eos_id is None else roles["eos"],
        special_ids=tuple(sorted(token["id"] for token in added if token["special"])),
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        proof=proof,
    )


def _load(source: Path, data: bytes) -> Tokenizer:
    try:
        text = data.decode()
        parse_tokenizer(text)
        return load_tokenizer(text)
    except EngineFormatError as error:
        raise damaged(source, error.found, error.expected) from error
    except UnicodeDecodeError as error:
        raise damaged(source, str(error), "text in UTF-8") from error


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Without the truncation and padding that were in force when it was saved."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encoder(tokenizer: Tokenizer) -> Encode:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _special_texts(data: bytes) -> Iterator[str]:
    yield from (token["content"] for token in json.loads(data).get("added_tokens", []))


def _all_texts(model: SentencePieceModel, texts: Iterable[str]) -> Iterator[str]:
    yield from texts
    yield from (text.replace("\u2581", " ") for text in piece_texts(model.scores))
    yield from (piece for piece in model.pieces if piece not in model.scores)


def _check_ids(files: TokenizerFiles, path: Path, data: bytes, tokenizer: Tokenizer) -> None:
    """The library numbers added tokens itself, whatever ids are written beside them."""
    added = json.loads(data).get("added_tokens", [])
    declared = [(token["content"], token["id"]) for token in added]
    declared += [(token.text, token.id) for token in declared_tokens(files)]
    for text, index in declared:
        found = tokenizer.token_to_id(text)
        if found != index:
            raise TokenizerError(
                f"{path} and the files beside it disagree about an added token.",
                found=f"{text!r} is {'unknown' if found is None else found}",
                expected=f"{text!r} as {index}",
                fix=_SAVE_AGAIN,
            )


def _overlay(files: TokenizerFiles, path: Path, data: bytes, tokenizer: Tokenizer) -> bytes:
    """Give `tokenizer` the traits that tokenizer_config.json says its added tokens have.

    Returns its JSON: `data` itself where they agree, as files that were saved together do.
    """
    stored = {token["content"]: token for token in json.loads(data).get("added_tokens", [])}
    described = declared_tokens(files) if files.config.get("added_tokens_decoder") else []
    traits = {token.text: _traits(token) for token in described}
    for text in named_tokens(files):
        if tokenizer.token_to_id(text) is None:
            raise _lacks(path, text)
        traits[text] = {**traits.get(text, stored.get(text, {})), "special": True}
    changed = [
        AddedToken(text, **{name: wanted[name] for name in _TRAITS if name in wanted})
        for text, wanted in traits.items()
        if any(stored.get(text, {}).get(name) != value for name, value in wanted.items())
    ]
    tokenizer.add_tokens(changed)
    return tokenizer.to_str().encode() if changed else data


def _lacks(path: Path, text: str) -> TokenizerError:
    return TokenizerError(
        f"{path} lacks a special token that the files beside it name.",
        found=f"{text!r}, which it does not know",
        expected="every token that has a role, or is called special",
        fix=_SAVE_AGAIN,
    )


def _traits(token: Token) -> dict[str, bool]:
    return {name: getattr(token, name) for name in _TRAITS}


def _differing(files: TokenizerFiles, encode: Encode, texts: Iterable[str]) -> int | None:
    if files.sentencepiece is None:
        return None
    try:
        model = read_sentencepiece(files.sentencepiece)
        added = read_added_tokens(files, model.pieces)
    except TokenizerError:
        return None  # not used, so its faults are none of ours
    legacy = files.config_flag("legacy", default=True)
    reference = ReferenceTokenizer(model.data, added, legacy=legacy)
    return sum(encode(text) != reference.encode(text) for text in texts)


def _begin_token(path: Path, tokenizer: Tokenizer) -> str | None:
    """The token that the tokenizer puts before every text, if there is one."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    if full == plain:
        return None
    if full[1:] != plain:
        raise _adds_more(path, f"{plain} becomes {full}")
    token: str | None = tokenizer.id_to_token(full[0])
    return token


def _adds_more(path: Path, found: str) -> TokenizerError:
    return TokenizerError(
        f"{path} asks for special tokens around a prompt that cannot be reproduced.",
        found=found,
        expected="a begin token before it, or nothing",
        fix="set add_eos_token to false, if the model was not trained with an end token there",
    )
