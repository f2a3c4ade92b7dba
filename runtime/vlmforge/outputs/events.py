"""What a request sends, and what callers get of it."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

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
    choice: int = 0
    error_code: str | None = None


class Event(Struct, frozen=True):
    """A delta, or an error, of the item `index` of a call.

    Attributes:
        choice: Which of its answers.
        whole: The error is the item's: it has no other answers.
        last: The item ends with it.
    """

    index: int
    delta: Response | None = None
    error: Exception | None = None
    choice: int = 0
    whole: bool = True
    last: bool = True


def error_response(index: int, error: Exception, choice: int = 0) -> Response:
    """What stands in a list for an item that failed."""
    error = as_ours(error)
    return Response(
        index=index,
        session_id=index,
        choice=choice,
        finish_reason="error",
        error_code=error.code,
        error_message=str(error),
    )


def piece_of(event: Event) -> Response | None:
    """What an event adds to an answer; an error of the whole item is raised."""
    if event.error is None:
        return event.delta
    if event.whole:
        raise event.error
    return error_response(event.index, event.error, event.choice)


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
        piece.choice,
        piece.error_code,
    )
