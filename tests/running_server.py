"""A server that runs in a thread of this process, with an engine that tests share."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest
from openai import OpenAI
from starlette.applications import Starlette

from conftest import HANGS
from vlmforge import Pipeline
from vlmforge.backends import DecoderBatch, LikeliestDecoder
from vlmforge.server.app import make_app
from vlmforge.server.run import make_server
from vlmforge.server.served import Served
from vlmforge.server.settings import ServerSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Running:
    """A server, and how to reach it."""

    app: Starlette
    port: int
    key: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=HANGS)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANGS)

    def send(self, data: bytes) -> bytes:
        """All that comes back for `data` until the server closes or has answered once."""
        with self.connect() as sock:
            sock.sendall(data)
            return read_response(sock)


@contextmanager
def held(pipe: Pipeline, steps: int = 20) -> Iterator[None]:
    """After some more steps the engine stands still until the block is left."""
    decoder, released, number = pipe._engine.decoder, threading.Event(), itertools.count(1)

    def slowly(run: Callable[[DecoderBatch], T]) -> Callable[[DecoderBatch], T]:
        def slow(batch: DecoderBatch) -> T:
            if next(number) > steps:
                assert released.wait(HANGS)
            return run(batch)

        return slow

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "step", slowly(decoder.step))
        if isinstance(decoder, LikeliestDecoder):
            patch.setattr(decoder, "likeliest", slowly(decoder.likeliest))
        try:
            yield
        finally:
            released.set()


def read_response(sock: socket.socket) -> bytes:
    """One response, its length as its head says; or what came until the connection closed."""
    found = b""
    while True:
        head, blank, body = found.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n") if blank else ():
            if line.startswith(b"content-length:") and len(body) >= int(line.partition(b":")[2]):
                return found
        try:
            more = sock.recv(1 << 16)
        except ConnectionResetError:
            return found
        if not more:
            return found
        found += more


@contextmanager
def running(
    pipes: Sequence[tuple[str, Pipeline]], settings: ServerSettings | None = None
) -> Iterator[Running]:
    """Serve these pipelines until the block is left; the server must then end by itself."""
    settings = settings or ServerSettings()
    app = make_app([Served(name, pipe) for name, pipe in pipes], settings)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(256)
        server = make_server(app, settings)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        key = settings.api_keys[0] if settings.api_keys else "none"
        try:
            yield Running(app, sock.getsockname()[1], key)
        finally:
            app.state.admission.draining = True
            thread.join(HANGS)
            assert not thread.is_alive()
