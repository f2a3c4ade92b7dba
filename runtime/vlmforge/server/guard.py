"""Around every request: the key, headers of the response, errors as JSON, one line in the log."""

from __future__ import annotations

import json
import logging
import secrets
import time
import traceback

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmforge.server.admission import Admission
from vlmforge.server.api_errors import ApiError, api_error
from vlmforge.server.metrics import Metrics
from vlmforge.server.settings import ServerSettings

logger = logging.getLogger("vlmforge.server")

_GONE = 499  # as nginx writes of a client that went away
_NOTHING = "default-src 'none'; frame-ancestors 'none'"  # the page has a policy of its own


class Guard:
    """ASGI middleware: see the module."""

    def __init__(
        self, app: ASGIApp, *, settings: ServerSettings, admission: Admission, metrics: Metrics
    ) -> None:
        self._app, self._settings = app, settings
        self._admission, self._metrics = admission, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and see to it that it ends in words."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        log: dict[str, object] = {"id": f"req-{secrets.token_hex(12)}"}
        scope.setdefault("state", {})["log"] = log

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Request-Id", str(log["id"]))
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Content-Security-Policy", _NOTHING)
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        try:
            await self._guarded(scope, receive, sent)
        except ClientDisconnect:
            status = _GONE
        except Exception as error:
            failed = api_error(error)
            log["error"] = failed.code
            if failed.status == 500:
                logger.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            _let_go(error)
            if status == 0:
                await self._refuse(failed, scope, receive, sent)
        finally:
            seconds = time.perf_counter() - began
            self._metrics.count(scope["path"], status, seconds)
            self._write(scope, status, seconds, log)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._admission.check_key(scope["path"], Headers(scope=scope))
        with self._admission.bodies(receive) as counted:
            await self._app(scope, counted, send)

    async def _refuse(self, failed: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {}
        if failed.status in (429, 503):
            headers["Retry-After"] = str(self._settings.retry_seconds)
        if failed.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        await JSONResponse(failed.body, failed.status, headers)(scope, receive, send)

    def _write(self, scope: Scope, status: int, seconds: float, log: dict[str, object]) -> None:
        line = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            **log,
        }
        if self._settings.log_json:
            logger.info("%s", json.dumps(line, ensure_ascii=True))
        else:
            logger.info("%s", " ".join(f"{name}={_shown(line[name])}" for name in line))


def _let_go(error: BaseException | None) -> None:
    """Forget the body: frames that an error came through hold it until garbage is collected."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _shown(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)
