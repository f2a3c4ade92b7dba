"""What a server does not take is refused with a status that clients tell apart, and in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conftest import HANGS, wait_until
from running_server import Running, held, running
from stand_in import Gate, Parts, stand_in
from vlmforge import Pipeline, pipeline
from vlmforge.server.settings import ServerSettings, server_vision_config

HELLO = [{"role": "user", "content": "hello"}]
BROKEN = "data:image/png;base64,AAAA"


@pytest.fixture(scope="module")
def pipe(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, vision_config=server_vision_config(domains=(".org",))) as made:
        yield made


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Running]:
    settings = ServerSettings(api_keys=("right", "also-right"), max_images=2)
    with running([("tiny", pipe)], settings) as made:
        yield made


def images(*urls: object, **limits: int) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url, **limits}} for url in urls]
    return [{"role": "user", "content": parts}]


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no messages": ({"messages": None}, 400, "messages"),
    "empty": ({"messages": []}, 400, "at least one"),
    "not a list": ({"messages": "hi"}, 400, "list of objects"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
    "injected role": ({"messages": [{"role": "{{ 7*7 }}", "content": "x"}]}, 400, "role"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "content"),
    "audio": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        400,
        "image_url",
    ),
    "tool calls": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
        400,
        "tool_calls",
    ),
    "temperature": ({"temperature": 2.5}, 400, "temperature"),
    "text for a number": ({"top_p": "high"}, 400, "top_p"),
    "true for a number": ({"max_tokens": True}, 400, "max_tokens"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "unknown": ({"temprature": 1}, 400, "temprature"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    "bias": ({"logit_bias": {"1": 5}}, 400, "logit_bias"),
    "stop": ({"stop": [1]}, 400, "stop"),
    "stop of nothing": ({"stop": [""]}, 400, "stop"),
    "stream options": ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "tops alone": ({"top_logprobs": 3}, 400, "logprobs=true"),
    "too many tops": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "schema": ({"response_format": {"type": "xml"}}, 400, "xml"),
    "too long": ({"messages": [{"role": "user", "content": "a b " * 9000}]}, 400, "window"),
    "model": ({"model": "gpt-4o"}, 404, "tiny"),
    "broken image": ({"messages": images(BROKEN)}, 422, "image"),
    "no pixels": ({"messages": images(BROKEN, max_pixels=0)}, 400, "max_pixels"),
    "limits of pixels": ({"messages": images(BROKEN, max_pixels=9)}, 400, "no limits of pixels"),
    "size": ({"messages": images(BROKEN, resized_width=9)}, 400, "resized_width"),
    "too many images": ({"messages": images(BROKEN, BROKEN, BROKEN)}, 400, "at most 2"),
    "file": ({"messages": images("file:///etc/passwd")}, 400, "http"),
    "path": ({"messages": images("/etc/passwd")}, 400, "http"),
    "number": ({"messages": images(7)}, 400, "http"),
    "other domain": ({"messages": images("http://example.com/x.png")}, 422, ".org"),
    "loopback": ({"messages": images("http://127.0.0.1/x.png")}, 422, ".org"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_body_that_is_not_taken(server: Running, name: str, stream: bool) -> None:
    changed, status, words = BAD[name]
    if stream and "stream_options" in changed:
        return  # there it is right
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "stream": stream} | changed
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=bearer("right"))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"] and error["code"] and error["type"]
    assert "found:" in error["message"] and "fix:" in error["message"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_the_client_raises_its_own_errors(server: Running) -> None:
    create = server.client.chat.completions.create
    for given, error in (
        ({"temperature": 9}, openai.BadRequestError),
        ({"model": "other"}, openai.NotFoundError),
        ({"messages": images(BROKEN)}, openai.UnprocessableEntityError),
    ):
        body: dict[str, Any] = {"model": "tiny", "messages": HELLO, **given}
        with pytest.raises(error):
            create(**body)


def test_the_client_tells_every_status_apart() -> None:
    fails_from, gate = 0, Gate()
    gate.open.set()

    def fail(name: str, number: int) -> None:
        if name == "step" and number >= fails_from:
            gate.passed()
            raise RuntimeError("out of order")

    def ask(server: Running, **given: Any) -> None:
        body: dict[str, Any] = {"model": "x", "messages": HELLO, "max_tokens": 2, **given}
        server.client.chat.completions.create(**body)

    parts = Parts(3)
    parts.before = fail
    settings = ServerSettings(
        api_keys=("right",),
        max_body_bytes=2000,
        max_concurrent_requests=1,
        shutdown_seconds=HANGS,
    )
    with stand_in(parts) as pipe, running([("x", pipe)], settings) as server:
        with pytest.raises(openai.InternalServerError, match="out of order") as failed:
            ask(server)
        assert failed.value.status_code == 500
        with pytest.raises(openai.APIError, match="out of order"):
            ask(server, stream=True)
        fails_from = parts.calls["step"] + 3  # in the middle of a stream, which has begun by then
        gate.open.clear()
        pieces = server.client.chat.completions.create(
            model="x",
            messages=HELLO,  # type: ignore[arg-type]
            max_tokens=9,
            temperature=0,  # tokens by chance may have no text to begin a stream with
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert next(pieces).choices[0].delta.role == "assistant"
        gate.open.set()
        with pytest.raises(openai.APIError, match="out of order"):
            list(pieces)
        with pytest.raises(openai.AuthenticationError):
            ask(dataclasses.replace(server, key="wrong"))
        with pytest.raises(openai.APIStatusError) as large:
            ask(server, messages=[{"role": "user", "content": "x" * 2000}])
        assert large.value.status_code == 413
        wait_until(lambda: server.app.state.admission.running == 0)  # the stream's place is free
        server.app.state.admission.running = 1
        with pytest.raises(openai.RateLimitError):
            ask(server)
        server.app.state.admission.draining = True  # it listens until its last request has ended
        with pytest.raises(openai.InternalServerError, match="shutting down") as ending:
            ask(server)
        server.app.state.admission.running = 0
        assert ending.value.status_code == 503


def test_keys(server: Running) -> None:
    for path in ("/v1/models", "/metrics", "/v1/tokenize", "/nowhere"):
        for headers in ({}, bearer("wrong"), {"Authorization": "right"}, bearer("righ\u00e9")):
            encoded = {k: v.encode("latin-1") for k, v in headers.items()}
            answer = httpx.get(server.url + path, headers=encoded)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/", "/health", "/health/live", "/health/ready"):
        assert httpx.get(server.url + path).status_code == 200
    for key in ("right", "also-right"):
        assert httpx.get(server.url + "/v1/models", headers=bearer(key)).status_code == 200


def test_paths_and_methods(server: Running) -> None:
    key = bearer("right")
    assert httpx.get(server.url + "/v1/nothing", headers=key).json()["error"]["code"] == "not_found"
    wrong = httpx.get(server.url + "/v1/chat/completions", headers=key)
    assert wrong.status_code == 405 and wrong.headers["Allow"] == "POST"
    for path in ("/../../etc/passwd", "/..%2f..%2fetc/passwd", "/page/index.html", "//etc/passwd"):
        assert httpx.get(server.url + path, headers=key).status_code == 404
    missing = httpx.get(server.url + "/v1/models/a%2fb", headers=key)
    assert missing.status_code == 404 and "a/b" in missing.json()["error"]["message"]


def test_the_page_needs_nothing_from_elsewhere(server: Running) -> None:
    page = httpx.get(server.url + "/")
    policy = page.headers["Content-Security-Policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy
    assert "http://" not in page.text and "https://" not in page.text
    assert page.headers["X-Content-Type-Options"] == "nosniff"


def test_more_requests_than_places(pipe: Pipeline) -> None:
    settings = ServerSettings(max_concurrent_requests=1, shutdown_seconds=HANGS)
    with running([("tiny", pipe)], settings) as server:
        body: dict[str, Any] = {
            "model": "tiny",
            "temperature": 0,  # it begins with a token that has text
            "messages": HELLO,
            "stream": True,
            "max_tokens": 3000,
            "ignore_eos": True,
        }
        url = f"{server.url}/v1/chat/completions"
        with held(pipe), httpx.stream("POST", url, json=body) as stream:
            assert stream.status_code == 200
            refused = httpx.post(url, json=body | {"stream": False})
            assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
            assert "--max-concurrent-requests" in refused.json()["error"]["message"]
            server.app.state.admission.draining = True
            ending = httpx.post(url, json=body)
            assert ending.status_code == 503 and ending.headers["Retry-After"]
            assert httpx.get(f"{server.url}/health/ready").status_code == 503
            assert httpx.get(f"{server.url}/health/live").status_code == 200
