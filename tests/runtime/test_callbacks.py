"""What a caller's own functions may do in the worker: raise anything, and call the pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stand_in import answered, plain, png, stand_in
from vlmforge import GenerationConfig, Pipeline, Response
from vlmforge.errors import (
    CancelledError,
    InternalError,
    PipelineError,
    PromptError,
    VlmforgeError,
)

Logits = np.ndarray[Any, np.dtype[np.float32]]
PROMPTS: list[Any] = ["a", ("look", png(1)), "a b c", "d"]
CONFIGS = [plain(count) for count in (9, 14, 5, 7)]


class Unheard(BaseException):
    """An exception that nobody knows."""


@pytest.fixture
def pipe() -> Iterator[Pipeline]:
    with stand_in() as made:
        yield made


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What each prompt gives with nothing beside it."""
    with stand_in(slots=1, enable_prefix_caching=False) as pipe:
        pairs = zip(PROMPTS, CONFIGS, strict=True)
        return [whole(pipe(prompt, config)).token_ids for prompt, config in pairs]


def whole(response: object) -> Response:
    assert isinstance(response, Response)
    return response


def check_alive(pipe: Pipeline, alone: list[list[int]]) -> None:
    found = answered(lambda: pipe(PROMPTS, CONFIGS))
    assert isinstance(found, list)
    assert [response.token_ids for response in found] == alone


def processor(raised: BaseException) -> GenerationConfig:
    def raises(_: list[int], logits: Logits) -> Logits:
        raise raised

    return plain(logits_processors=[raises])


@pytest.mark.parametrize("error", [RuntimeError("mine"), MemoryError(), PromptError("odd")])
def test_what_a_processor_raises_is_raised_as_it_is(pipe: Pipeline, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        answered(lambda: pipe("a", processor(error)))
    assert caught.value is error


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Unheard()], ids=repr
)
def test_what_would_end_a_thread_is_an_error_of_the_request(
    pipe: Pipeline, alone: list[list[int]], error: BaseException
) -> None:
    with pytest.raises(InternalError) as caught:
        answered(lambda: pipe("a", processor(error)))
    assert caught.value.__cause__ is error
    assert type(error).__name__ in caught.value.found
    assert "logits processor" in caught.value.fix
    check_alive(pipe, alone)


def test_in_a_list_a_processor_ends_its_own_item(pipe: Pipeline, alone: list[list[int]]) -> None:
    configs = [*CONFIGS]
    configs[1] = processor(ValueError("mine"))
    responses = answered(lambda: pipe(PROMPTS, configs))
    assert isinstance(responses, list)
    assert [r.finish_reason == "error" for r in responses] == [i == 1 for i in range(4)]
    assert responses[1].error_code == "internal_error"
    assert "ValueError: mine" in str(responses[1].error_message)
    assert [r.token_ids for i, r in enumerate(responses) if i != 1] == alone[:1] + alone[2:]


CALLS: dict[str, Callable[[Pipeline], object]] = {
    "call": lambda pipe: pipe("again"),
    "list": lambda pipe: pipe(["again", "and again"]),
    "stream": lambda pipe: list(pipe.stream_infer("again")),
    "chat": lambda pipe: pipe.chat("again"),
    "generate": lambda pipe: asyncio.run(_first(pipe)),
}


async def _first(pipe: Pipeline) -> object:
    return await anext(aiter(pipe.generate("again")))


@pytest.mark.parametrize("how", CALLS)
def test_a_call_from_inside_the_pipeline_is_refused_at_once(pipe: Pipeline, how: str) -> None:
    raised: list[BaseException] = []

    def calls(_: list[int], logits: Logits) -> Logits:
        try:
            CALLS[how](pipe)
        except VlmforgeError as error:
            raised.append(error)
        return logits

    answer = answered(lambda: pipe("a", plain(1, logits_processors=[calls])))
    assert whole(answer).generate_token_len == 1
    (error,) = raised
    assert isinstance(error, PipelineError)
    assert "logits processor" in error.found
    assert error.fix


def test_a_processor_may_close_the_pipeline() -> None:
    with stand_in() as pipe:

        def closes(_: list[int], logits: Logits) -> Logits:
            pipe.close()
            return logits

        answer = answered(lambda: whole(pipe("a", plain(9, logits_processors=[closes]))))
        assert answer.finish_reason == "abort"
        with pytest.raises(CancelledError, match="closed"):
            pipe("a")
