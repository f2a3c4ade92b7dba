"""Connections with limits: to the time that a request's headers take, and to their size."""

from __future__ import annotations

import asyncio
import json

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vlmforge.server.api_errors import ApiError, refused

_MOST_HEADER_BYTES = 64 << 10
_LINGER_SECONDS = 2.0


class PatientProtocol(HttpToolsProtocol):
    """HTTP/1.1 that does not wait for ever for a request's headers, as slow clients would have it.

    uvicorn limits the time between requests, but neither the time for their headers nor the size.
    """

    header_seconds = 15.0
    _waiting: asyncio.TimerHandle | None = None
    _refused = False  # and what still comes is thrown away
    _unread = 0  # bytes that came, and were neither the end of headers nor a part of a body

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    @override
    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unread += len(data)
        super().data_received(data)
        if self._unread > _MOST_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(_large_headers())
        self._watch()

    @override
    def on_headers_complete(self) -> None:
        self._unread = 0
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()

    @override
    def send_400_response(self, msg: str) -> None:
        self._refuse(_not_http(msg))

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _refuse(self, failed: ApiError) -> None:
        """Answer in the form of all errors, and close: what comes next could not be told apart.

        Not at once: a client that is still sending would see a broken connection, not the answer.
        """
        if self.cycle is None or self.cycle.response_complete:
            body = json.dumps(failed.body).encode()
            self.transport.write(
                STATUS_LINE[failed.status]
                + b"content-type: application/json\r\nconnection: close\r\n"
                + f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
        self._refused = True
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _watch(self) -> None:
        """A timer runs while no request is being answered and one may have begun."""
        idle = self.cycle is None or self.cycle.response_complete
        if not idle:
            self._stop()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(self.header_seconds, self._give_up)

    def _stop(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def patient_protocol(header_seconds: float) -> type[PatientProtocol]:
    """The protocol with this limit, as uvicorn takes it."""
    return type("Protocol", (PatientProtocol,), {"header_seconds": header_seconds})


def _large_headers() -> ApiError:
    return refused(
        431,
        "The request's headers are too large.",
        found=f"more than {_MOST_HEADER_BYTES} bytes",
        expected=f"at most {_MOST_HEADER_BYTES} bytes, the address included",
        fix="send less in headers; a prompt and its pictures belong into the body",
    )


def _not_http(found: str) -> ApiError:
    return refused(
        400,
        "What was sent is not a request of HTTP/1.1.",
        found=found,
        expected="a request as RFC 9112 has it",
        fix="use an OpenAI client or curl; for HTTPS, put a proxy that speaks it in front",
    )
