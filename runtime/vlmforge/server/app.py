"""The ASGI application: `make_app(...)` for uvicorn or any other server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from msgspec import Struct
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from vlmforge.outputs.response import Response as Piece
from vlmforge.server.admission import Admission
from vlmforge.server.answers import Kind, Writer
from vlmforge.server.api_errors import ApiError, api_error, refused
from vlmforge.server.body import read_json
from vlmforge.server.fields import Asked, parse_chat, parse_completion, parse_tokenize
from vlmforge.server.guard import Guard
from vlmforge.server.metrics import Metrics
from vlmforge.server.page import read_page
from vlmforge.server.served import Served, chosen
from vlmforge.server.settings import ServerSettings
from vlmforge.server.token_text import TokenTexts

T = TypeVar("T")


class Api(Struct, frozen=True):
    """The endpoints."""

    engines: Mapping[str, Served]
    settings: ServerSettings
    admission: Admission
    metrics: Metrics

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body = await read_json(request, self.settings)
        asked = parse_chat(body, self.settings.max_images)
        return await self._answer(request, asked, "chat.completion")

    async def completion(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        asked = parse_completion(await read_json(request, self.settings))
        return await self._answer(request, asked, "text_completion")

    async def tokenize(self, request: Request) -> Response:
        """`POST /v1/tokenize`: what a prompt really is, without running it."""
        body = await read_json(request, self.settings)
        name, prompt, templated = parse_tokenize(body, self.settings.max_images)
        served = chosen(self.engines, name)
        with self.admission.place():
            rendered = await run_in_threadpool(served.render, prompt, templated=templated)
        spans = [
            {
                "image": span.image,
                "start": span.start,
                "length": span.length,
                "text_start": rendered.image_texts[span.image][0],
                "text_end": rendered.image_texts[span.image][1],
            }
            for span in rendered.image_spans
        ]
        return JSONResponse(
            {
                "model": served.name,
                "count": len(rendered.token_ids),
                "max_model_len": served.pipe.session_len,
                "tokens": list(rendered.token_ids),
                "text": rendered.text,
                "image_spans": spans,
            }
        )

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        cards = [served.card() for served in self.engines.values()]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{name}`."""
        return JSONResponse(chosen(self.engines, request.path_params["name"]).card())

    async def live(self, request: Request) -> Response:
        """`GET /health/live`: the process answers."""
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """`GET /health` and `/health/ready`: 503 once the server ends."""
        if self.admission.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ready", "running": self.admission.running})

    async def prometheus(self, request: Request) -> Response:
        """`GET /metrics`."""
        text, kind = self.metrics.text()
        return PlainTextResponse(text, media_type=kind)

    async def _answer(self, request: Request, asked: Asked, kind: Kind) -> Response:
        served = chosen(self.engines, asked.model)
        writer = Writer(kind, served.name, TokenTexts(served.pipe), asked.top_logprobs)
        request.state.log.update(id=writer.id, model=served.name)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self.admission.place())
            pieces = served.pieces(asked, self.settings.request_seconds)
            await stack.enter_async_context(contextlib.aclosing(pieces))
            if not asked.stream:
                answers = await _while_connected(request, _gather(pieces))
                request.state.log.update(_tokens(answers))
                return JSONResponse(writer.whole(answers))
            # A request that fails before its first piece has a status of its own.
            first = await _while_connected(request, anext(pieces))
            events = _events(_chained(first, pieces), asked, writer, request)
            return _Stream(events, {"X-Request-Id": writer.id}, stack.pop_all())
        raise AssertionError("an exit stack swallows nothing")


def make_app(engines: Sequence[Served], settings: ServerSettings | None = None) -> Starlette:
    """The application that serves these engines, by their names.

    Its `state.admission` says what runs, and ends it: see `Admission`.
    """
    settings = settings or ServerSettings()
    table = {served.name: served for served in engines}
    admission = Admission(settings)
    metrics = Metrics(table, admission)
    api = Api(table, settings, admission, metrics)
    html, policy = read_page()

    async def index(request: Request) -> Response:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    def get(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, endpoint, methods=["GET"])

    def post(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, endpoint, methods=["POST"])

    app = Starlette(
        routes=[
            get("/", index),
            get("/health", api.ready),
            get("/health/ready", api.ready),
            get("/health/live", api.live),
            get("/metrics", api.prometheus),
            get("/v1/models", api.models),
            get("/v1/models/{name:path}", api.model),
            post("/v1/chat/completions", api.chat),
            post("/v1/completions", api.completion),
            post("/v1/tokenize", api.tokenize),
        ],
        exception_handlers={HTTPException: _http_problem},
    )
    app.add_middleware(Guard, settings=settings, admission=admission, metrics=metrics)
    app.state.admission = admission
    return app


class _Stream(EventSourceResponse):
    """A stream that gives back what it holds, also when it ends before its first piece."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        held: contextlib.AsyncExitStack,
    ) -> None:
        super().__init__(events, headers=headers)
        self._held = held

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:  # the request's place, and the request itself
            await super().__call__(scope, receive, send)


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "invalid_request")
    found = f"{request.method} {request.url.path[:200]}"
    failed = refused(
        error.status_code,
        "The server has no such endpoint.",
        found=found,
        expected="POST /v1/chat/completions, /v1/completions or /v1/tokenize; "
        "GET /v1/models, /health or /metrics",
        fix="OpenAI(base_url='http://HOST:PORT/v1', api_key=...)",
    )
    failed.code = code
    return JSONResponse(failed.body, error.status_code, error.headers)


async def _gather(pieces: AsyncIterator[Piece]) -> Sequence[Piece]:
    whole = Piece()
    async for piece in pieces:
        whole.extend(_sound(piece))
    return whole.choices


def _sound(piece: Piece) -> Piece:
    """The piece; ApiError where it is the end of one answer of several that failed."""
    if piece.finish_reason == "error":
        raise ApiError(500, str(piece.error_message), str(piece.error_code))
    return piece


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away (ClientDisconnect)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for left in (task, gone):
            left.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chained(first: Piece, rest: AsyncIterator[Piece]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in rest:
        yield piece


async def _events(
    pieces: AsyncIterator[Piece],
    asked: Asked,
    writer: Writer,
    request: Request,
) -> AsyncGenerator[bytes, None]:
    """The stream's bytes. What belongs together is one write: it costs more than its length."""
    whole, held = Piece(), b""
    if writer.kind == "chat.completion":
        held = b"".join(_event(writer.first(index)) for index in range(asked.config.n))
    try:
        async for piece in pieces:
            whole.extend(_sound(piece))
            held += _event(writer.piece(piece))
            if piece.finish_reason is None:  # behind the last one comes the rest at once
                yield held
                held = b""
    except Exception as error:  # noqa: BLE001 - the stream's client gets it
        failed: ApiError = api_error(error)
        request.state.log.update(error=failed.code)
        held += b"event: error\r\n" + _event(failed.body)
    else:
        if asked.usage:
            held += _event(writer.last(whole.choices))
    request.state.log.update(_tokens(whole.choices))
    yield held + b"data: [DONE]\r\n\r\n"


_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event; JSON has no line breaks of its own.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    return b"data: " + _ENCODE(data).encode("utf-8") + b"\r\n\r\n"


def _tokens(answers: Sequence[Piece]) -> dict[str, object]:
    """What the log says of a request that ran."""
    timings = answers[0].timings
    return {
        "prompt_tokens": max(answer.input_token_len for answer in answers),
        "completion_tokens": sum(answer.generate_token_len for answer in answers),
        "cached_tokens": answers[0].cached_tokens,
        "finish_reason": ",".join(str(answer.finish_reason) for answer in answers),
        "stages": "" if timings is None else str(timings),
    }
