"""A SentencePiece BPE model as a `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vlmforge.errors import TokenizerError
from vlmforge.inputs.tokenizer import KEEP_VALID_BYTES
from vlmforge_builder.tokenizer.added_tokens import AddedTokens
from vlmforge_builder.tokenizer.files import damaged
from vlmforge_builder.tokenizer.proto import PieceType, TrainerSpec, parse_model

InvalidBytes: TypeAlias = Literal["keep_valid", "whole_run"]
"""Byte tokens that are not UTF-8 become U+FFFD each: only these, or their whole run."""

_SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A SentencePiece BPE model, checked to be of a kind that can be converted exactly.

    Attributes:
        file: Where it was read from.
        data: Its bytes.
        pieces: Ids of all pieces.
        scores: Scores of the pieces that text is made of (not control, unknown or byte pieces).
        user_defined: Pieces that are cut out of the text whole.
        unk: Text of the unknown piece.
        byte_fallback: Unknown characters become byte pieces.
        dummy_prefix: A space is put before every text.
        strip_spaces: Spaces at the ends are removed, several in a row become one.
    """

    file: Path
    data: bytes
    pieces: Mapping[str, int]
    scores: Mapping[str, float]
    user_defined: tuple[str, ...]
    unk: str
    byte_fallback: bool
    dummy_prefix: bool
    strip_spaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read and check a model.

    Raises:
        TokenizerError: it is damaged, or of a kind that has no equal in the other format.
    """
    data = path.read_bytes()
    try:
        proto = parse_model(data)
    except ValueError as error:
        raise damaged(path, f"{len(data)} bytes: {error}", "a SentencePiece model") from error
    _check_settings(path, proto)
    scores = {
        piece.piece: piece.score
        for piece in proto.pieces
        if piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)
    }
    user_defined = tuple(p.piece for p in proto.pieces if p.type == PieceType.USER_DEFINED)
    _check_characters(path, scores, frozenset(user_defined))
    return SentencePieceModel(
        file=path,
        data=data,
        pieces={piece.piece: index for index, piece in enumerate(proto.pieces)},
        scores=scores,
        user_defined=user_defined,
        unk=next(p.piece for p in proto.pieces if p.type == PieceType.UNKNOWN),
        byte_fallback=proto.trainer_spec.byte_fallback,
        dummy_prefix=proto.normalizer_spec.add_dummy_prefix,
        strip_spaces=proto.normalizer_spec.remove_extra_whitespaces,
    )


def _check_settings(path: Path, proto: Any) -> None:
    trainer = proto.trainer_spec
    if trainer.model_type != TrainerSpec.BPE:
        kind = TrainerSpec.ModelType.Name(trainer.model_type)
        raise _refused(path, f"a model of type {kind}", "type BPE")
    if trainer.treat_whitespace_as_suffix:
        raise _refused(path, "spaces at the ends of pieces", "spaces at their beginnings")
    if not proto.normalizer_spec.escape_whitespaces:
        raise _refused(path, "spaces that are not escaped", "spaces as U+2581 in the pieces")
    if proto.normalizer_spec.precompiled_charsmap:
        # The library applies such a table to each grapheme, SentencePiece to the whole text; they
        # differ on combining marks and on composed scripts.
        name = proto.normalizer_spec.name
        raise _refused(path, f"normalisation by the table {name!r}", "text taken as it is")
    kinds = [piece.type for piece in proto.pieces]
    if kinds.count(PieceType.UNKNOWN) != 1:
        raise damaged(path, f"{kinds.count(PieceType.UNKNOWN)} unknown pieces", "one")
    bytes_known = kinds.count(PieceType.BYTE)
    if trainer.byte_fallback and bytes_known != 256:
        raise damaged(path, f"byte fallback with {bytes_known} byte pieces", "256")
    for piece in proto.pieces:
        if piece.type == PieceType.UNUSED and len(piece.piece) > 1:
            raise _refused(path, f"the unused piece {piece.piece!r}", "no unused pieces")


def _check_characters(path: Path, scores: Mapping[str, float], whole: Collection[str]) -> None:
    """SentencePiece can merge characters that are no pieces themselves; the other format cannot."""
    for piece in scores:
        if len(piece) == 1 or piece in whole:
            continue
        for character in piece:
            if character not in scores:
                found = f"piece {piece!r} with {character!r}, which is no piece"
                raise _refused(path, found, "every character of a piece as a piece")


def sentencepiece_json(
    model: SentencePieceModel, added: AddedTokens, *, legacy: bool, invalid_bytes: InvalidBytes
) -> bytes:
    """`tokenizer.json` of a model; equal inputs give equal bytes.

    It adds no BOS and no EOS. See `ReferenceTokenizer` for `legacy`.

    Raises:
        TokenizerError: this combination of settings has no equal in the other format.
    """
    prefix = model.dummy_prefix if legacy else True
    _check_composition(model, added, legacy=legacy, prefix=prefix)
    vocab = {**model.pieces, **{token.text: token.id for token in added.tokens}}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model, added),
        "normalizer": _normalizer(model, prefix=legacy and prefix),
        "pre_tokenizer": None if legacy else _prefix_at_start(),
        "post_processor": None,
        "decoder": _decoder(invalid_bytes, strip_twice=legacy and prefix),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": merges(model),
        },
    }
    return json.dumps(data, ensure_ascii=False, indent=1).encode() + b"\n"


def merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to make a piece of two others: best piece first, then in order of the parts' ids.

    SentencePiece merges the pair that makes the piece of highest score, the other format the pair
    that comes first in this list.
    """
    whole = set(model.user_defined)
    mergeable = {piece: score for piece, score in model.scores.items() if piece not in whole}
    ranked = []
    for piece, score in mergeable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                pieces = model.pieces
                ranked.append((-score, pieces[piece], pieces[left], pieces[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _check_composition(
    model: SentencePieceModel, added: AddedTokens, *, legacy: bool, prefix: bool
) -> None:
    texts = {token.text for token in added.tokens}
    if not legacy and model.strip_spaces:
        raise _refused(
            model.file, "legacy=false and remove_extra_whitespaces", "one of the two at most"
        )
    cut = [piece for piece in model.user_defined if piece not in texts]
    if cut and (prefix or model.strip_spaces):
        raise _refused(
            model.file,
            f"user-defined pieces such as {cut[0]!r} and a prefix or a normalisation",
            "user-defined pieces only where text is taken as it is, or as added tokens",
        )


def _added_tokens(model: SentencePieceModel, added: AddedTokens) -> list[dict[str, object]]:
    texts = {token.text for token in added.tokens}
    rows = [
        (token.id, token.text, token.lstrip, token.rstrip, False, token.special)
        for token in added.tokens
    ]
    # Pieces spell a space as U+2581, so user-defined ones are looked for after normalisation.
    rows += [
        (model.pieces[piece], piece, False, False, True, False)
        for piece in model.user_defined
        if piece not in texts
    ]
    return [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": lstrip,
            "rstrip": rstrip,
            "normalized": normalized,
            "special": special,
        }
        for index, text, lstrip, rstrip, normalized, special in sorted(rows)
    ]


def _normalizer(model: SentencePieceModel, *, prefix: bool) -> dict[str, object]:
    steps: list[dict[str, object]] = []
    if model.strip_spaces:
        steps += [_replace({"Regex": r"\A +"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append(_replace({"String": " "}, _SPACE))
    if model.strip_spaces:
        # Looking behind, a run is tried at its start only: a long one would cost its square.
        steps.append(_replace({"Regex": rf"(?<!{_SPACE}){_SPACE}+\z"}, ""))
    return {"type": "Sequence", "normalizers": steps}


def _prefix_at_start() -> dict[str, object]:
    """One prefix, before the whole text only, and also where that begins with a space.

    The first step takes spaces for ' ', which no longer occurs, so it never finds one in place.
    """
    step: dict[str, object] = {"type": "Metaspace", "split": False}
    return {
        "type": "Sequence",
        "pretokenizers": [
            {**step, "replacement": " ", "prepend_scheme": "first"},
            {**step, "replacement": _SPACE, "prepend_scheme": "never"},
        ],
    }


def _decoder(invalid_bytes: InvalidBytes, *, strip_twice: bool) -> dict[str, object]:
    fallback = {"type": "ByteFallback"}
    strip = 1
    if invalid_bytes == "keep_valid":
        # The original takes a leading space off, then SentencePiece its dummy prefix.
        strip += strip_twice
        # Not of the library, which ignores it: see vlmforge.inputs.tokenizer.
        fallback["invalid_run"] = KEEP_VALID_BYTES
    return {
        "type": "Sequence",
        "decoders": [
            _replace({"String": _SPACE}, " "),
            fallback,
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": strip, "stop": 0},
        ],
    }


def _replace(pattern: dict[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _refused(path: Path, found: str, expected: str) -> TokenizerError:
    return TokenizerError(
        f"{path} has no equal in the tokenizer.json format.",
        found=found,
        expected=expected,
        fix="put a tokenizer.json made by the model's authors into the folder",
    )
