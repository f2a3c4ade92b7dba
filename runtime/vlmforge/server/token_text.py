"""What a token looks like in a text, for log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from typing_extensions import override

from vlmforge.api.pipeline import Pipeline


class TokenTexts(Mapping[int, str]):
    """Texts of single tokens by their ids, a leading space included."""

    def __init__(self, pipe: Pipeline) -> None:
        self._tokenizer = pipe.tokenizer

    @override
    def __getitem__(self, token: int) -> str:
        # A decoder may strip the first space of a text: behind itself, a token shows all it has.
        once = self._tokenizer.decode([token], skip_special_tokens=False)
        twice = self._tokenizer.decode([token, token], skip_special_tokens=False)
        return twice[len(once) :]

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    @override
    def __len__(self) -> int:
        return self._tokenizer.vocab_size
