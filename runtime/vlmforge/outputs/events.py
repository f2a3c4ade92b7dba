"""What a request sends, and what callers get of it."""

from __future__ import annotations

from dataclasses import dataclass

from vlmforge.errors import as_ours
from vlmforge.outputs.response import Response


@dataclass(frozen=True, slots=True)
class GenOut:
    """What `Pipeline.generate` yields; see `Response` for the fields."""

    response: str
    history_token_len: int
    input_token_len: int
    generate_token_len: int
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: list[dict[int, float]] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """A delta, or an error, of the item `index` of a call."""

    index: int
    delta: Response | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether the item ends with it."""
        return self.error is not None or (
            self.delta is not None and self.delta.finish_reason is not None
        )


def error_response(index: int, error: Exception) -> Response:
    """What stands in a list for an item that failed."""
    error = as_ours(error)
    return Response(
        index=index,
        session_id=index,
        finish_reason="error",
        error_code=error.code,
        error_message=str(error),
    )


def gen_out(piece: Response, whole: Response) -> GenOut:
    """A piece, with the lengths of what came so far."""
    return GenOut(
        piece.text,
        0,
        whole.input_token_len,
        whole.generate_token_len,
        piece.finish_reason,
        piece.token_ids,
        piece.logprobs,
    )
