"""Responses as OpenAI's API has them: whole, or as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct, field

from vlmforge.outputs.response import Response, Timings
from vlmforge.vl.boxes import Box

Kind = Literal["chat.completion", "text_completion"]
TokenText = Mapping[int, str]


class Writer(Struct, frozen=True):
    """Writes the answers of one request.

    Attributes:
        kind: Of the endpoint.
        model: The name that it is served by.
        text_of: A token's text by its id, for log-probabilities; `[]` is asked for each.
        top_logprobs: How many of the likeliest are written; None: no log-probabilities.
    """

    kind: Kind
    model: str
    text_of: TokenText
    top_logprobs: int | None
    id: str = field(default_factory=lambda: f"req-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Response]) -> dict[str, object]:
        """The body of a response without a stream."""
        return {
            **self._head(self.kind),
            "choices": [self._choice(answer) for answer in answers],
            "usage": usage(answers),
            "vlmforge": ledger(answers[0]),
        }

    def first(self, index: int) -> dict[str, object]:
        """The chunk that begins an answer of a chat."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, delta: Response) -> dict[str, object]:
        """A piece as a chunk."""
        content = {"content": delta.text} if delta.text else {}
        chunk = self._chunk(
            delta.choice, content, self._logprobs(delta), finish_reason(delta.finish_reason)
        )
        if delta.finish_reason is not None:
            chunk["vlmforge"] = ledger(delta)
        return chunk

    def last(self, answers: Sequence[Response]) -> dict[str, object]:
        """The chunk that has the usage and no choice."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage(answers)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat.completion" else self.kind

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, answer: Response) -> dict[str, object]:
        content: dict[str, object] = {"text": answer.text}
        if self.kind == "chat.completion":
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        return {
            "index": answer.choice,
            **content,
            "logprobs": self._logprobs(answer),
            "finish_reason": finish_reason(answer.finish_reason),
        }

    def _chunk(
        self, index: int, delta: dict[str, str], logprobs: object, reason: str | None
    ) -> dict[str, object]:
        content: dict[str, object] = {"text": delta.get("content", "")}
        if self.kind == "chat.completion":
            content = {"delta": delta}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head(self._chunk_kind), "choices": [choice]}

    def _logprobs(self, answer: Response) -> dict[str, object] | None:
        if self.top_logprobs is None or answer.logprobs is None:
            return None
        pairs = list(zip(answer.token_ids, answer.logprobs, strict=True))
        if self.kind == "chat.completion":
            return {"content": [self._entry(token, table) for token, table in pairs]}
        tops = [self._tops(table) for _, table in pairs]
        return {
            "tokens": [self.text_of[token] for token, _ in pairs],
            "token_logprobs": [table[token] for token, table in pairs],
            "top_logprobs": [dict(top) for top in tops],
        }

    def _entry(self, token: int, table: Mapping[int, float]) -> dict[str, object]:
        tops = [_token(text, value) for text, value in self._tops(table)]
        return {**_token(self.text_of[token], table[token]), "top_logprobs": tops}

    def _tops(self, table: Mapping[int, float]) -> list[tuple[str, float]]:
        best = sorted(table.items(), key=lambda item: -item[1])[: self.top_logprobs]
        return [(self.text_of[token], value) for token, value in best]


def _token(text: str, value: float) -> dict[str, object]:
    return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8"))}


def finish_reason(reason: str | None) -> str | None:
    """Ours in OpenAI's words: what is cut short, for whatever reason, has ended by its length."""
    return {"abort": "length", "error": "length"}.get(reason or "", reason)


def usage(answers: Sequence[Response]) -> dict[str, object]:
    """The count of tokens; the prompt's include those of its images."""
    prompt = max(answer.input_token_len for answer in answers)
    completion = sum(answer.generate_token_len for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens},
    }


def ledger(answer: Response) -> dict[str, object]:
    """Where the time of an answer went, and the boxes in it. Ours: clients may leave it alone."""
    timings = {} if answer.timings is None else _fields(answer.timings)
    return {"timings": timings, "boxes": [_fields(box) for box in answer.boxes]}


def _fields(flat: Timings | Box) -> dict[str, object]:
    """As `dataclasses.asdict`, which copies deeply and takes 30 times as long."""
    return {name: getattr(flat, name) for name in flat.__dataclass_fields__}
