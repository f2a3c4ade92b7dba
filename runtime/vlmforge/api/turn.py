"""A turn of a conversation that has its answer."""

from __future__ import annotations

from msgspec import Struct

from vlmforge.inputs.messages import Message
from vlmforge.outputs.response import Response


class Turn(Struct, frozen=True):
    """A finished turn.

    Attributes:
        prompt: As it was given.
        messages: Of the prompt, and behind them that of the answer.
        do_preprocess: False: it was sent verbatim.
        salt: Of who shares the caches with it.
        response: The answer.
    """

    prompt: object
    messages: tuple[Message, ...]
    do_preprocess: bool
    salt: bytes
    response: Response
