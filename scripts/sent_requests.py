"""Sending drawn requests in every form of call, and what must be true of each answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from drawn_requests import Drawn
from vlmforge import GenerationConfig, Pipeline, Response, Session
from vlmforge.errors import VlmforgeError

# What a caller did wrong, or the memory does not hold; anything else is a fault of ours.
EXPECTED_CODES = frozenset(
    {
        "invalid_config",
        "invalid_request",
        "invalid_image",
        "image_fetch_failed",
        "context_length_exceeded",
    }
)


@dataclass(frozen=True)
class Outcome:
    """How one prompt ended.

    Attributes:
        end: A finish reason, the code of a typed error, "left" or "looked".
        tokens: That were generated.
        fault: What must not be; None: nothing.
    """

    end: str
    tokens: int = 0
    fault: str | None = None


def send(pipe: Pipeline, drawn: Drawn, window: int) -> list[Outcome]:
    """Send a request and judge what comes of each of its prompts; raises nothing."""
    try:
        config = GenerationConfig(**drawn.config)
        found = _SENDERS[drawn.form](pipe, drawn, config)
        return [judged(answer, drawn.config, window) for answer in found]
    except VlmforgeError as error:
        return [_refused(error.code, f"{type(error).__name__}: {error}")]
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        return [Outcome("untyped", fault=f"{type(error).__name__}: {error}")]


def judged(answer: Response | str, config: dict[str, Any], window: int) -> Outcome:
    """Whether a whole answer may be as it is; a text says what else was done."""
    if isinstance(answer, str):
        return Outcome(answer)
    if answer.finish_reason == "error":
        return _refused(str(answer.error_code), str(answer.error_message))
    tokens, fault = answer.generate_token_len, None
    most = config.get("max_new_tokens", 512)
    room = window - answer.input_token_len
    if answer.finish_reason not in ("stop", "length"):
        fault = f"nobody cancelled it, but it ended with {answer.finish_reason!r}"
    elif answer.finish_reason == "length" and tokens != min(most or window, room):
        fault = f"cut at {tokens} tokens of {most}, with room for {room}"
    elif len(answer.token_ids) != tokens:
        fault = f"{len(answer.token_ids)} ids of {tokens} tokens"
    return Outcome(str(answer.finish_reason), tokens, fault)


def _refused(code: str, message: str) -> Outcome:
    return Outcome(code, fault=None if code in EXPECTED_CODES else message)


def _call(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    answer = pipe(drawn.prompts[0], config, do_preprocess=drawn.do_preprocess)
    return list(answer) if isinstance(answer, list) else [answer]


def _list(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    answers = pipe(list(drawn.prompts), config, do_preprocess=drawn.do_preprocess)
    return list(answers) if isinstance(answers, list) else [answers]


def _stream(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    pieces = pipe.stream_infer(list(drawn.prompts), config, do_preprocess=drawn.do_preprocess)
    return _gathered(pieces, drawn.leave)


def _chat(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    session = pipe.chat("hi", gen_config=GenerationConfig(max_new_tokens=2))
    assert isinstance(session, Session)
    pipe.chat(drawn.prompts[0], session, config, do_preprocess=drawn.do_preprocess)
    assert session.response is not None
    return [session.response]


def _chat_stream(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    pieces = pipe.chat(
        drawn.prompts[0], gen_config=config, stream_response=True, do_preprocess=drawn.do_preprocess
    )
    assert not isinstance(pieces, Session)
    return _gathered(pieces, drawn.leave)


def _look(pipe: Pipeline, drawn: Drawn, _: GenerationConfig) -> list[Response | str]:
    pipe.count_tokens(drawn.prompts[0], do_preprocess=drawn.do_preprocess)
    return ["looked"]


def _generate(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    return asyncio.run(_generated(pipe, drawn, config, stream=True))


def _generate_whole(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    return asyncio.run(_generated(pipe, drawn, config, stream=False))


async def _generated(
    pipe: Pipeline, drawn: Drawn, config: GenerationConfig, *, stream: bool
) -> list[Response | str]:
    """Leaves early by leaving the loop, by stopping the session, or by cancelling the task."""
    whole, left = Response(), drawn.leave
    messages, way = drawn.prompts[0], drawn.number % 3

    async def read() -> bool:
        pieces = pipe.generate(
            messages, drawn.number, config, stream, do_preprocess=drawn.do_preprocess
        )
        count = 0
        async with aclosing(pieces):
            async for piece in pieces:
                whole.extend(Response(**_fields(piece)))
                count += 1
                if left is not None and count > left:
                    if way == 0:
                        return False
                    await pipe.stop_session(drawn.number)
        return True

    if left is None or way < 2:
        ended = await read()
        stopped = whole.finish_reason == "abort" and left is not None
        return ["left" if stopped or not ended else whole]
    try:
        await asyncio.wait_for(read(), 0.003 * left)
    except TimeoutError:
        return ["left"]
    return ["left" if whole.finish_reason == "abort" else whole]


def _fields(piece: Any) -> dict[str, Any]:
    return {
        "text": piece.response,
        "generate_token_len": piece.generate_token_len,
        "input_token_len": piece.input_token_len,
        "finish_reason": piece.finish_reason,
        "token_ids": piece.token_ids or [],
    }


def _gathered(pieces: Iterable[Response], leave: int | None) -> list[Response | str]:
    """Whole answers of a stream; those that had not ended when the caller went are "left"."""
    whole: dict[int, Response] = {}
    for number, piece in enumerate(pieces):
        whole.setdefault(piece.index, Response()).extend(piece)
        if number == leave:
            break
    assert leave is not None or all(one.finish_reason for one in whole.values())
    return [one if one.finish_reason else "left" for one in whole.values()]


_SENDERS: dict[str, Callable[[Pipeline, Drawn, GenerationConfig], Sequence[Response | str]]] = {
    "call": _call,
    "list": _list,
    "stream": _stream,
    "chat": _chat,
    "chat_stream": _chat_stream,
    "generate": _generate,
    "generate_whole": _generate_whole,
    "look": _look,
}
