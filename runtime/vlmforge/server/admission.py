"""Who may come in: API keys, the number of requests, and the end of the server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from vlmforge.limits import return_freed_memory
from vlmforge.server.api_errors import ApiError, refused
from vlmforge.server.settings import ServerSettings

_LARGE_BODY = 8 << 20
"""Bytes of a body that took longer than to give its memory back to the system."""


class Admission:
    """Counts requests that run, and bytes of bodies. Only the event loop's thread uses it."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._keys = [_digest(key) for key in settings.api_keys]
        self.running = 0
        self.draining = False
        self.body_bytes = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request while it is answered.

        Raises:
            ApiError: 503 once the server ends, 429 when there is no place.
        """
        if self.draining:
            raise refused(
                503,
                "The server is shutting down.",
                found="a new request",
                expected="requests before the server was asked to end",
                fix="send it again: another replica, or this one when it is back, takes it",
            )
        if self.running >= self._settings.max_concurrent_requests:
            raise refused(
                429,
                "The server has as many requests as it takes.",
                found=f"{self.running} requests that run or wait",
                expected=f"at most {self._settings.max_concurrent_requests}",
                fix=f"send it again in {self._settings.retry_seconds} s, or raise "
                "--max-concurrent-requests",
            )
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @contextmanager
    def bodies(self, receive: Receive) -> Iterator[Receive]:
        """`receive` of a request, whose body is counted until the block is left.

        It raises ApiError 429 when the bodies of all requests together are too many bytes.
        """
        held, most = 0, self._settings.max_bodies_bytes

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            held += size
            self.body_bytes += size
            if self.body_bytes > most:
                raise refused(
                    429,
                    "The server has as many bodies in memory as it takes.",
                    found=f"{self.body_bytes} bytes, of requests that arrive or are answered",
                    expected=f"at most {most}",
                    fix=f"send it again in {self._settings.retry_seconds} s, give images by URL, "
                    "or raise --max-bodies-mb",
                )
            return message

        try:
            yield counted
        finally:
            self.body_bytes -= held
            if held > _LARGE_BODY:
                return_freed_memory()

    def check_key(self, path: str, headers: Headers) -> None:
        """ApiError 401 for a path that needs a key and a request without a right one."""
        if not self._keys or path in self._settings.open_paths:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All are compared, each in constant time: neither which nor how far is told.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise _no_key()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _no_key() -> ApiError:
    return refused(
        401,
        "The request has no API key that opens this server.",
        found="no key, or a wrong one",
        expected="the header Authorization: Bearer KEY",
        fix="OpenAI(base_url=..., api_key=KEY), with a key that the server was started with",
    )
