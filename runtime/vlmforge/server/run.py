"""Running the application with uvicorn: limits of connections, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlmforge.server.settings import ServerSettings

logger = logging.getLogger("vlmforge.server")

_MOST_HEADER_BYTES = 64 << 10
_IDLE_SECONDS = 15


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that does not wait for ever for a request's headers, as slow clients would have it.

    uvicorn limits the size of headers, and the time between requests, but not the time for them.
    """

    header_seconds = 15.0
    _waiting: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

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


class DrainingServer(uvicorn.Server):
    """Ends in two steps: first it takes no more requests, then, when none runs, it closes.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, app: Starlette, settings: ServerSettings) -> None:
        super().__init__(config)
        self._admission, self._settings = app.state.admission, settings
        self._deadline: float | None = None

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._admission.draining:
            self.force_exit = self.should_exit = True
            return
        self._admission.draining = True
        logger.info("ending: %d requests are finished first", self._admission.running)

    @override
    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if not self._admission.draining:
            return False
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._settings.shutdown_seconds
        self.should_exit = self._admission.running == 0 or now >= self._deadline
        return self.should_exit


def make_server(app: Starlette, settings: ServerSettings) -> DrainingServer:
    """A server for an application of `make_app`; `run(sockets=[...])` serves until it ends."""
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call] # streams end whole
    protocol: Any = type(
        "Protocol", (PatientProtocol,), {"header_seconds": settings.header_seconds}
    )
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        backlog=2048,
    )
    return DrainingServer(config, app, settings)
