"""What is around every request, without a server."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from vlmforge.server.admission import Admission
from vlmforge.server.api_errors import refused
from vlmforge.server.guard import Guard
from vlmforge.server.metrics import Metrics
from vlmforge.server.settings import ServerSettings


class Body(bytearray):
    """One that can be watched."""


def test_a_body_that_was_refused_is_gone_with_its_request() -> None:
    """Not with the next garbage collection: until then many more may come."""
    kept: list[weakref.ref[Body]] = []
    status: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive, send
        data = Body(b"x" * 100)
        kept.append(weakref.ref(data))
        try:
            int(data)
        except ValueError as error:
            raise refused(400, "No.", found="x", expected="y", fix="z") from error

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    settings = ServerSettings()
    admission = Admission(settings)
    metrics = Metrics({}, admission)
    guard = Guard(app, settings=settings, admission=admission, metrics=metrics)
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/x", "headers": []}
    gc.disable()
    try:
        asyncio.run(guard(scope, receive, send))
        assert status == [400]
        assert kept[0]() is None
    finally:
        gc.enable()
