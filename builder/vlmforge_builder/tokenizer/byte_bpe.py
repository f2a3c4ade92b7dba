"""A byte-level BPE vocabulary in tiktoken's format as a `tokenizer.json`.

The file has a line for each token: its bytes in base64 and its rank, which is its id. Merges are
not written down: any two neighbours whose bytes together are a token may merge, the lowest rank
first.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vlmforge.errors import TokenizerError
from vlmforge_builder.tokenizer.byte_bpe_reference import ByteReference, merge_pieces
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer
from vlmforge_builder.tokenizer.corpus import PROOF_CORPUS, token_texts
from vlmforge_builder.tokenizer.files import damaged
from vlmforge_builder.tokenizer.proof import prove

# How text is cut before merging; digits stand alone.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Tokens behind the vocabulary, in the order of their ids.

    Attributes:
        texts: All of them; the first has the id after the last rank.
        hidden: Those that decoded text leaves out.
        stops: Those that end an answer; the first is the end token.
    """

    texts: Sequence[str]
    hidden: frozenset[str]
    stops: Sequence[str]


def convert_byte_bpe(path: Path, specials: SpecialTokens) -> ConvertedTokenizer:
    """Convert the vocabulary file `path` and prove the result equal.

    Text is NFC-normalised first, special tokens in it included.

    Raises:
        TokenizerError: the file is damaged, lacks a byte, or the result differs.
    """
    ranks = read_ranks(path)
    ids = {text: len(ranks) + i for i, text in enumerate(specials.texts)}
    data = json.dumps(_tokenizer_json(ranks, ids, specials.hidden), ensure_ascii=False).encode()
    tokenizer = Tokenizer.from_str(data.decode())
    reference = ByteReference(ranks, ids)
    proof = prove(
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        reference.encode,
        (*PROOF_CORPUS, *token_texts(specials.texts), *_vocabulary_texts(ranks)),
        oracle=f"the ranks of {path.name}",
        file=path,
    )
    return ConvertedTokenizer(
        json=data,
        bos_id=None,
        bos_token="",
        add_bos=False,
        eos_ids=tuple(ids[text] for text in specials.stops),
        eos_token=specials.stops[0],
        special_ids=tuple(ids[text] for text in specials.texts if text in specials.hidden),
        vocab_size=len(ranks) + len(ids),
        proof=proof,
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens by their bytes, in the order of their ids (TokenizerError otherwise)."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            found = f"line {number}: {line[:40]!r} ({error})"
            raise damaged(path, found, "a token in base64 and its rank on each line") from error
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise damaged(path, f"{len(ranks)} tokens", "tokens of the ranks 0, 1, 2, ..., each once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise damaged(path, f"no token of the byte {missing[0]:#04x}", "a token of every byte")
    return ranks


def _tokenizer_json(
    ranks: Mapping[bytes, int], specials: Mapping[str, int], hidden: frozenset[str]
) -> dict[str, Any]:
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    added = [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,  # looked for in the normalised text, as the original does
            "special": text in hidden,
        }
        for text, index in specials.items()
    ]
    steps = [
        {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a whole piece that is a token is that token
            "vocab": {spelled(token): rank for token, rank in ranks.items()},
            "merges": [[spelled(left), spelled(right)] for left, right in merges(ranks)],
        },
    }


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token is merged from, in the order of the tokens' ranks.

    There is one at most: within a token, merges happen in an order that does not depend on what is
    around it, so the last two parts are always the same. A token that merging the parts of its own
    text never reaches has none.
    """
    found = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = merge_pieces(token, ranks, below=rank)
            if len(parts) == 2:
                found.append((parts[0], parts[1]))
    return found


def byte_letters() -> dict[int, str]:
    """The letter that the `tokenizers` library writes for each byte.

    Printable ones of Latin-1 stand for themselves, the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)
    }


def _vocabulary_texts(ranks: Mapping[bytes, int]) -> list[str]:
    """Tokens that are text, alone and beside their neighbours in rank.

    Not those with a character that is newer than Python's Unicode tables: the `tokenizers` library
    may know it already.
    """
    texts = []
    for token in ranks:
        try:
            text = token.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if all(unicodedata.category(character) != "Cn" for character in text):
            texts.append(text)
    pairs = [first + second for first, second in itertools.pairwise(texts)]
    return [*texts, *pairs]


def expect_ids(tokenizer: ConvertedTokenizer, expected: Mapping[str, int], file: Path) -> None:
    """TokenizerError unless the tokens have these ids, which `file` says."""
    for text, index in expected.items():
        found = tokenizer.token_id(text)
        if found != index:
            raise TokenizerError(
                f"{file} and the tokenizer disagree about a token.",
                found=f"{text!r} is {'unknown' if found is None else found}",
                expected=f"{text!r} as {index}",
                fix="check that the tokenizer files belong to this checkpoint",
            )
