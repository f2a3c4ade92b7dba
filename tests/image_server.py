"""A local web server of images for tests, and a network of names that all lead to it."""

from __future__ import annotations

import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from conftest import HANGS

PIXELS = np.random.default_rng(1).integers(0, 256, (9, 8, 3), dtype=np.uint8)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format="PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by path. The server's `seen` lists (path, headers); `stop` ends slow answers."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        route = self.path.partition("?")[0].strip("/").replace("-", "_")
        getattr(self, f"send_{route.partition('/')[0]}", self.send_missing)()

    def start(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def send_image(self) -> None:
        self.start(200, Content_Length=str(len(png())))
        self.wfile.write(png())

    def send_chunked(self) -> None:
        self.start(200, Transfer_Encoding="chunked")
        for byte in png():
            self.chunk(bytes([byte]))
        self.chunk(b"")

    def send_until_close(self) -> None:
        self.start(200, Connection="close")
        self.wfile.write(png())

    def send_endless(self) -> None:
        self.start(200, Transfer_Encoding="chunked")
        while not self.server.stop.is_set():
            self.chunk(bytes(1000))

    def send_declared_large(self) -> None:
        self.start(200, Content_Length="123456789")

    def send_short(self) -> None:
        self.start(200, Content_Length="500", Connection="close")
        self.wfile.write(bytes(7))

    def send_drip(self) -> None:
        self.start(200, Content_Length="1000000")
        while not self.server.stop.wait(0.02):
            self.wfile.write(b"x")

    def send_drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.server.stop.wait(0.02):
            self.wfile.write(b"x")

    def send_silence(self) -> None:
        self.server.stop.wait(HANGS)

    def send_garbage(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")

    def send_to(self) -> None:
        status, _, location = self.path.partition("/to/")[2].partition("/")
        self.start(int(status), Location=location, Content_Length="0")

    def send_loop(self) -> None:
        self.start(302, Location="/loop", Content_Length="0")

    def send_no_location(self) -> None:
        self.start(302, Content_Length="0")

    def send_text(self) -> None:
        self.start(200, Content_Length="6")
        self.wfile.write(b"<html>")

    def send_missing(self) -> None:
        self.start(404, Content_Length="0")

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.stop = threading.Event()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what these tests are about."""


class Network:
    """Names resolve to `names`; dialled addresses are recorded and lead to the local server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
        self.names: dict[str, list[str]] = {}
        self.resolved: list[str] = []
        self.dialled: list[tuple[str, int]] = []
        self.unreachable: set[str] = set()
        connect = socket.socket.connect

        def local_connect(sock: socket.socket, address: tuple[str, int]) -> None:
            self.dialled.append(address[:2])
            if address[0] in self.unreachable:
                raise ConnectionRefusedError(111, "Connection refused")
            connect(sock, server.server_address)

        monkeypatch.setattr(socket, "getaddrinfo", self.getaddrinfo)
        monkeypatch.setattr(socket.socket, "connect", local_connect)

    def getaddrinfo(self, host: str, port: int, **_: int) -> list[tuple[object, ...]]:
        self.resolved.append(host)
        if host not in self.names:
            raise socket.gaierror(-2, "Name or service not known")
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in self.names[host]
        ]
