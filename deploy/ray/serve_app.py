"""Replicas of one engine on a Ray cluster, behind one address.

    VLMFORGE_ENGINE=/shared/engine serve run deploy.ray.serve_app:app

`Door` takes HTTP and tells the conversation (or the picture that many ask about) of each request;
`Replica` serves an engine, and `AffinityRouter` sends what belongs together to the replica that has
it in its cache, by rendezvous hashing: when replicas come or go, only their own share moves.

Settings are environment variables: VLMFORGE_ENGINE, VLMFORGE_API_KEYS, VLMFORGE_REPLICAS=MIN,MAX,
VLMFORGE_CPUS (of a replica).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from vlmforge import env
from vlmforge.server.api_errors import ApiError, refused

Headers = list[tuple[bytes, bytes]]
_MOST_BODY = 64 << 20
_BUSY = 64  # requests at a replica, above which its neighbour takes more


def affinity(body: bytes) -> str:
    """What a request should share a cache with: its first picture, or else how it begins.

    Later turns of a conversation begin as the first one did, so they have its key.
    """
    try:
        messages = json.loads(body)["messages"]
        parts = [
            part
            for message in messages
            if isinstance(message["content"], list)
            for part in message["content"]
        ]
        pictures = [part["image_url"] for part in parts if part.get("type") == "image_url"]
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        beginning: object = pictures[:1] or messages[: first + 1]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, StopIteration):
        beginning = ""  # the replica says what is wrong with it
    return hashlib.sha256(json.dumps(beginning, sort_keys=True).encode()).hexdigest()


class AffinityRouter(RequestRouter):
    """Ranks replicas for a key; one that is busy is passed over."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One replica a rank, the best first."""
        key = str(pending_request.kwargs.get("key", "")) if pending_request else ""

        def weight(replica: RunningReplica) -> bytes:
            return hashlib.sha256(f"{key} {replica.replica_id.unique_id}".encode()).digest()

        return [[replica] for replica in sorted(candidate_replicas, key=weight, reverse=True)]


class Replica:
    """Serves the engine to the door."""

    def __init__(self, engine: str, api_keys: Sequence[str]) -> None:
        from vlmforge import pipeline
        from vlmforge.server.app import make_app
        from vlmforge.server.served import Served
        from vlmforge.server.settings import ServerSettings, server_vision_config

        self._pipe = pipeline(engine, vision_config=server_vision_config())
        served = Served(Path(engine).name, self._pipe)
        self._app = make_app([served], ServerSettings(api_keys=tuple(api_keys)))
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(
        self, method: str, path: str, headers: Headers, body: bytes, *, key: str
    ) -> AsyncIterator[tuple[int, Headers] | bytes]:
        """Status and headers, then the body's pieces. Closing it cancels the request."""
        sent: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        gone = asyncio.Event()
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Mapping[str, Any]:
            if given:
                return given.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }
        task = asyncio.ensure_future(self._app(scope, receive, sent.put))
        task.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], [*message["headers"], (b"x-replica", self._name)]
                elif message["body"]:
                    yield message["body"]
        finally:
            gone.set()
            await asyncio.wait([task])

    def check_health(self) -> None:
        """Ray restarts a replica whose pipeline has died."""
        self._pipe.count_tokens("healthy?")


def _too_large() -> ApiError:
    return refused(
        413,
        "The request's body is too large.",
        found=f"more than {_MOST_BODY} bytes",
        expected=f"at most {_MOST_BODY} bytes",
        fix="send fewer or smaller images, or give them by URL",
    )


def _unavailable(error: RayError) -> Response:
    failed = refused(
        503,
        "The replica that had the request is gone.",
        found=type(error).__name__,
        expected="a replica that lives",
        fix="send it again: another replica takes it",
    )
    return JSONResponse(failed.body, failed.status, {"Retry-After": "1"})


class Door:
    """Takes HTTP requests and hands each to its replica."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """The replica's response, piece by piece."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MOST_BODY:
                return JSONResponse(_too_large().body, 413, {"Connection": "close"})
        pieces = self._replicas.answer.remote(
            request.method, request.url.path, list(request.headers.raw), body, key=affinity(body)
        )
        try:
            status, headers = await anext(aiter(pieces))
        except RayError as error:  # the replica has died; a client that sends it again gets another
            return _unavailable(error)
        answer = StreamingResponse(pieces, status)
        answer.raw_headers = list(headers)
        return answer


def build(
    engine: str,
    *,
    replicas: Sequence[int] = (1, 4),
    cpus: float = 2,
    api_keys: Sequence[str] = (),
) -> serve.Application:
    """The application: `replicas` are the fewest and the most, `cpus` are of each."""
    low, high = replicas
    replica = serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=_BUSY,
        ray_actor_options={"num_cpus": cpus},
        request_router_config=RequestRouterConfig(request_router_class=AffinityRouter),
        autoscaling_config=AutoscalingConfig(
            min_replicas=low, max_replicas=high, target_ongoing_requests=8
        ),
        health_check_period_s=5,
        graceful_shutdown_timeout_s=60,
    )
    door = serve.deployment(Door, name="door", max_ongoing_requests=1000)
    return door.bind(replica.bind(engine, tuple(api_keys)))


def _from_environment() -> serve.Application:
    low, _, high = os.environ.get("VLMFORGE_REPLICAS", "1,4").partition(",")
    return build(
        os.environ["VLMFORGE_ENGINE"],
        replicas=(int(low), int(high or low)),
        cpus=float(os.environ.get("VLMFORGE_CPUS", "2")),
        api_keys=env.api_keys(),
    )


if "VLMFORGE_ENGINE" in os.environ:
    app = _from_environment()
