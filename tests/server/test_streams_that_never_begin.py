"""A client that is gone before its stream's first piece: its place and its request are free."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

from conftest import wait_until
from stand_in import stand_in
from vlmforge.server.app import make_app
from vlmforge.server.served import Served

BODY = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 50}


def test_the_place_is_free_again() -> None:
    async def receive() -> MutableMapping[str, Any]:
        if given:
            return given.pop()
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)
        raise OSError("the client is gone")

    given = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]
    sent: list[MutableMapping[str, Any]] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [],
    }
    with stand_in() as pipe:
        app = make_app([Served("x", pipe)])

        async def run() -> int:
            await asyncio.gather(app(scope, receive, send), return_exceptions=True)
            return int(app.state.admission.running)

        assert asyncio.run(run()) == 0
        assert sent[0]["status"] == 200
        wait_until(lambda: not pipe._requests)  # the worker ends it, after its step
