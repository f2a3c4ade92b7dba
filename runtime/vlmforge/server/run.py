"""Running the application with uvicorn: limits of connections, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette
from typing_extensions import override

from vlmforge.server.patience import patient_protocol
from vlmforge.server.settings import ServerSettings

logger = logging.getLogger("vlmforge.server")

_IDLE_SECONDS = 15


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
    config = uvicorn.Config(
        app,
        http=patient_protocol(settings.header_seconds),
        ws="none",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=1,
        backlog=2048,
    )
    return DrainingServer(config, app, settings)
