"""Proof, text by text, that a `tokenizer.json` encodes as the original tokenizer does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vlmforge.errors import TokenizerError
from vlmforge.inputs.tokenizer_file import raise_unless_fault

Encode: TypeAlias = Callable[[str], list[int]]
_AROUND = 5


@dataclass(frozen=True, slots=True)
class TokenizerProof:
    """What was compared.

    Attributes:
        oracle: What `tokenizer.json` was compared with.
        texts: Number of texts, all with equal ids.
        tokens: Number of ids in them.
        differing: Texts to which a `tokenizer.model` beside a given `tokenizer.json` gives other
            ids; None if there is none to compare with. It is no fault: the `tokenizer.json` is
            what such a checkpoint is used with.
    """

    oracle: str
    texts: int
    tokens: int
    differing: int | None = None

    def __str__(self) -> str:
        text = f"equals {self.oracle} on {self.texts} texts, {self.tokens} tokens"
        return text + (f" ({self.differing} differ from tokenizer.model)" if self.differing else "")


def prove(
    encode: Encode, reference: Encode, texts: Iterable[str], *, oracle: str, file: Path
) -> TokenizerProof:
    """Compare two tokenizers.

    Raises:
        TokenizerError: they differ; names the text and the ids around the first difference. Or ours
            fails on a text.
    """
    count = tokens = 0
    for text in texts:
        ours, theirs = _encoded(encode, text, file), reference(text)
        if ours != theirs:
            raise _mismatch(text, ours, theirs, oracle, file)
        count += 1
        tokens += len(ours)
    return TokenizerProof(oracle, count, tokens)


def _encoded(encode: Encode, text: str, file: Path) -> list[int]:
    try:
        return encode(text)
    except BaseException as error:
        raise_unless_fault(error)
        raise TokenizerError(
            f"The tokenizer.json made from {file} fails on a text.",
            found=f"{error}, on {text[:60]!a}",
            expected="ids of its tokens",
            fix="put a tokenizer.json made by the model's authors into the folder",
        ) from error


def _mismatch(
    text: str, ours: Sequence[int], theirs: Sequence[int], oracle: str, file: Path
) -> TokenizerError:
    pairs = zip(ours, theirs, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    window = slice(max(0, first - _AROUND), first + _AROUND + 1)
    return TokenizerError(
        f"The tokenizer.json made from {file} is not equal to {oracle}.",
        found=f"{list(ours[window])} at token {window.start} of {text!r}",
        expected=f"{list(theirs[window])}",
        fix="put a tokenizer.json made by the model's authors into the folder",
    )
