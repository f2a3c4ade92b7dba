"""The body of a request: read within limits, and parsed strictly."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import Request

from vlmforge.engine.schema import parse_json
from vlmforge.server.api_errors import ApiError, refused
from vlmforge.server.settings import ServerSettings


async def read_json(request: Request, settings: ServerSettings) -> Mapping[str, object]:
    """The JSON object that was sent.

    Raises:
        ApiError: the body is too large, too slow, not JSON or not an object.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0]
    if kind.strip().lower() != "application/json":
        raise _not_json(f"Content-Type {kind[:80]!a}")
    try:
        async with asyncio.timeout(settings.body_seconds):
            data = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise _not_json(f"no whole body within {settings.body_seconds:g} s") from None
    try:
        parsed = parse_json(data.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError too
        raise _not_json(str(error).splitlines()[0][:200]) from error
    if not isinstance(parsed, dict):
        raise _not_json(f"a {type(parsed).__name__}")
    return parsed


async def _read(request: Request, most: int) -> bytearray:
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced[:20]) > most:
        raise _too_large(f"{announced[:20]} bytes", most)
    data = bytearray()  # grows in place: pieces would be in memory twice when they are joined
    async for chunk in request.stream():
        if len(data) + len(chunk) > most:
            raise _too_large(f"more than {most} bytes", most)
        data += chunk
    return data


def _too_large(found: str, most: int) -> ApiError:
    return refused(
        413,
        "The request's body is too large.",
        found=found,
        expected=f"at most {most} bytes",
        fix="send fewer or smaller images, or give them by URL",
    )


def _not_json(found: str) -> ApiError:
    return refused(
        400,
        "The request's body is not what was expected.",
        found=found,
        expected="a JSON object in UTF-8, with Content-Type: application/json",
        fix="use an OpenAI client, or curl -H 'Content-Type: application/json' -d '{...}'",
    )
