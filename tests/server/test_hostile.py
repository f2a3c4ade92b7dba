"""Clients that mean no good, or have bad luck: typed refusals, and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from conftest import HANGS, wait_until
from running_server import Running, held, read_response, running
from stand_in import settle
from vlmforge import Pipeline, pipeline
from vlmforge.server.settings import ServerSettings, server_vision_config

CHAT = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
LONG = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 4000,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture(scope="module")
def pipe(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, vision_config=server_vision_config()) as made:
        yield made


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Running]:
    patient = ServerSettings(max_body_bytes=1 << 20, header_seconds=HANGS, body_seconds=HANGS)
    with running([("tiny", pipe)], patient) as made:
        yield made


@pytest.fixture
def impatient(pipe: Pipeline) -> Iterator[Running]:
    """On a busy machine too impatient for anybody, so that others are served by another."""
    with running([("tiny", pipe)], ServerSettings(header_seconds=0.4)) as made:
        yield made


@pytest.fixture(autouse=True)
def _goes_on(server: Running) -> Iterator[None]:
    yield
    wait_until(lambda: server.app.state.admission.running == 0)
    found = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "still there?"}], max_tokens=2
    )
    assert found.usage is not None and found.usage.completion_tokens > 0


def post(body: bytes, *headers: str) -> bytes:
    lines = [f"Content-Length: {len(body)}", *headers]
    return (CHAT + "\r\n".join(lines) + "\r\n\r\n").encode() + body


BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "JSON"),
    "no JSON": (b"{", "JSON"),
    "NaN": (b'{"temperature": NaN}', "NaN"),
    "infinity": (b'{"temperature": 1e999, "messages": [{}], "model": "tiny"}', "temperature"),
    "twice": (b'{"model": "a", "model": "b"}', "twice"),
    "deep": (b"[" * 100_000, "nested"),
    "deep in a field": (b'{"messages": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested"),
    "a list": (b"[]", "a list"),
    "not UTF-8": (b'{"model": "\xff"}', "utf-8"),
    "UTF-16": ("{}".encode("utf-16"), "utf-8"),
    "surrogate": (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        "surrogate",
    ),
    "long number": (b'{"seed": 1' + b"0" * 10_000 + b"}", ""),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(server: Running, name: str) -> None:
    body, words = BODIES[name]
    answer = server.send(post(body))
    assert answer.startswith(b"HTTP/1.1 400"), answer[:200]
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert words in error["message"] and len(error["message"]) < 2000


def test_content_types(server: Running) -> None:
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/xml"):
        answer = server.send(post(b"{}", f"Content-Type: {kind}"))
        assert answer.startswith(b"HTTP/1.1 400") and b"Content-Type" in answer


def test_bodies_that_are_too_large(server: Running) -> None:
    # Announced: refused before a byte of it is read.
    head = f"{CHAT}Content-Length: {1 << 30}\r\n\r\n".encode()
    assert server.send(head).startswith(b"HTTP/1.1 413")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with server.connect() as sock:
        sock.sendall(f"{CHAT}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(17):
            sock.sendall(chunk)
        assert read_response(sock).startswith(b"HTTP/1.1 413")


def test_bodies_that_are_too_many(pipe: Pipeline) -> None:
    settings = ServerSettings(
        max_body_bytes=1 << 20, max_bodies_bytes=1 << 20, header_seconds=HANGS, body_seconds=HANGS
    )
    half = f"{CHAT}Content-Length: {1 << 20}\r\n\r\n".encode() + b" " * (600 << 10)
    with running([("tiny", pipe)], settings) as server, server.connect() as first:
        admission = server.app.state.admission
        first.sendall(half)
        wait_until(lambda: admission.body_bytes == 600 << 10)
        with server.connect() as second:
            second.sendall(half)
            answer = read_response(second)
        assert answer.startswith(b"HTTP/1.1 429") and b"--max-bodies-mb" in answer
        wait_until(lambda: admission.body_bytes == 600 << 10)
        first.close()  # what it held is free again
        wait_until(lambda: admission.body_bytes == 0)


def test_headers_that_are_too_large(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(CHAT.encode())
        answer = b""
        try:
            for _ in range(160):  # 10 MiB, were it to take them
                sock.sendall(b"X-Large: " + b"y" * 65_000 + b"\r\n")
            answer = read_response(sock)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert answer == b"" or (answer.startswith(b"HTTP/1.1 431") and b"fix:" in answer)


def test_what_is_not_http(server: Running) -> None:
    answer = server.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello over TLS")
    assert answer.startswith(b"HTTP/1.1 400")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert "HTTPS" in error["message"] and error["type"] == "invalid_request_error"
    endless = b"1;" + b"x" * 200_000  # an extension of a chunk, which is no part of a body
    with server.connect() as sock:
        with suppress(BrokenPipeError, ConnectionResetError):  # it may be told before all is sent
            sock.sendall(f"{CHAT}Transfer-Encoding: chunked\r\n\r\n".encode() + endless)
        assert read_response(sock)[:12] in (b"HTTP/1.1 400", b"")  # in words, if it is waited for


@pytest.mark.parametrize("begun", [b"", b"POST /v1/chat/comp", CHAT.encode()])
def test_clients_that_never_end_their_headers(impatient: Running, begun: bytes) -> None:
    with impatient.connect() as sock:
        sock.sendall(begun)
        assert read_response(sock) == b""  # closed by the server


def test_a_client_that_never_ends_its_body(pipe: Pipeline) -> None:
    head = f"{CHAT}Content-Length: 100\r\n\r\n".encode()
    settings = ServerSettings(header_seconds=HANGS, body_seconds=0.4)  # headers may come late
    with running([("tiny", pipe)], settings) as server:
        answer = server.send(head + b"{")
    assert answer.startswith(b"HTTP/1.1 400") and b"no whole body" in answer


def check_gone(server: Running, pipe: Pipeline, body: bytes) -> None:
    """In the middle of its answer: nothing of its request is left."""
    aborted = pipe.metrics().requests["abort"]
    with held(pipe):
        with server.connect() as sock:
            sock.sendall(post(body))
            wait_until(lambda: pipe.metrics().running == 1)
        wait_until(lambda: not pipe._requests)
    wait_until(lambda: pipe.metrics().requests["abort"] > aborted)  # by the worker's next step
    settle(pipe)
    assert pipe.metrics().requests["abort"] == aborted + 1
    wait_until(lambda: server.app.state.admission.running == 0)


def test_clients_that_go_away(server: Running, pipe: Pipeline) -> None:
    settle(pipe)  # whoever was answered before this is counted among those that run until then
    for stream in (True, False):
        check_gone(server, pipe, json.dumps(LONG | {"stream": stream}).encode())
    body = json.dumps(LONG | {"stream": False}).encode()
    with server.connect() as sock:  # in the middle of its body
        sock.sendall(f"{CHAT}Content-Length: 100\r\n\r\n{{".encode())
    with held(pipe), server.connect() as sock:  # half closed, which nobody can tell from gone
        sock.sendall(post(body))
        sock.shutdown(socket.SHUT_WR)
        assert read_response(sock) == b""  # and no whole answer that came before


def test_many_open_streams(server: Running) -> None:
    body = post(json.dumps(LONG | {"max_tokens": 3}).encode())
    socks = [server.connect() for _ in range(100)]
    for sock in socks:
        sock.sendall(body)
    for sock in socks:
        found = b""
        while b"[DONE]" not in found:
            more = sock.recv(1 << 16)
            assert more, found[-300:]
            found += more
        assert found.startswith(b"HTTP/1.1 200")
        sock.close()


def test_websockets_are_none_of_ours(server: Running) -> None:
    head = "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert server.send(head.encode()).startswith(b"HTTP/1.1 200")


def test_what_is_logged(
    server: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level("INFO", "vlmforge.server"):
        server.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a secret"}],
            max_tokens=2,
            extra_body={"ignore_eos": True},
        )
        httpx.get(server.url + "/v1/x%0a200%20forged")
        # A line is written after its answer was sent.
        wait_until(lambda: "forged" in caplog.text and "completion_tokens=2" in caplog.text)
    text = caplog.text
    assert "secret" not in text and "completion_tokens=2" in text and "stages=" in text
    assert "\n200 forged" not in text
