"""Clients that people use beside OpenAI's own: LangChain's ChatOpenAI, and LiteLLM.

Once a night, in an environment of their own, which `make test-nightly` makes (out/clients).
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import ROOT
from image_server import Server
from running_server import Running, running
from vlmforge import GenerationConfig, Pipeline, Response, pipeline
from vlmforge.server.settings import ServerSettings, server_vision_config

pytestmark = pytest.mark.nightly

PYTHON = ROOT / "out/clients/bin/python"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def pipe(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, vision_config=server_vision_config()) as made:
        yield made


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Running]:
    with running([("tiny", pipe)], ServerSettings(api_keys=("right",))) as made:
        yield made


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a picture."""
    monkeypatch.setenv("VLMFORGE_ALLOW_PRIVATE_URLS", "1")
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{made.server_address[1]}/image"
        made.shutdown()
        thread.join()


def picture(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user(text: str, *addresses: str) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in addresses]
    return {"role": "user", "content": [{"type": "text", "text": text}, *images]}


def case(*messages: dict[str, Any], stream: bool = False, **options: Any) -> dict[str, Any]:
    options = {"temperature": 0, "max_tokens": 12} | options
    return {"messages": messages, "options": options, "stream": stream, "key": "right"}


def answers(pipe: Pipeline, asked: dict[str, Any]) -> list[Response]:
    """Of the pipeline, for the same."""
    options = dict(asked["options"])
    sampled = options.pop("temperature") > 0
    config = GenerationConfig(
        max_new_tokens=options.pop("max_tokens"),
        do_sample=sampled,
        top_k=0 if sampled else 1,
        temperature=asked["options"]["temperature"] or 1.0,
        random_seed=options.pop("seed", None),
        n=options.pop("n", 1),
        stop_words=options.pop("stop", None),
        response_format=options.pop("response_format", None),
        logprobs=options.pop("top_logprobs", None),
    )
    answer = pipe(list(asked["messages"]), config)
    assert not isinstance(answer, list)
    return list(answer.choices)


@pytest.mark.parametrize("client", ["langchain", "litellm"])
def test_answers_are_those_of_the_pipeline(
    server: Running, pipe: Pipeline, address: str, client: str
) -> None:
    red, blue = picture("red"), picture("blue")
    hello = user("hello there")
    greedy = answers(pipe, case(hello))[0]
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    good = {
        "text": case(hello),
        "data URL": case(user("what is this?", red)),
        "address": case(user("what is this?", address)),
        "several": case(user("which?", red, blue)),
        "turns": case(
            user("what is this?", red), {"role": "assistant", "content": "a ball"}, user("and now?")
        ),
        "stream": case(user("what is this?", red), stream=True),
        "n": case(hello, n=3, temperature=1.2, seed=3),
        "seed": case(hello, temperature=1.5, seed=7),
        "same seed": case(hello, temperature=1.5, seed=7),
        "stop": case(hello, stop=[greedy.text[4:7]]),
        "logprobs": case(hello, logprobs=True, top_logprobs=2),
        "schema": case(hello, response_format=schema, max_tokens=40),
    }
    broken = user("what?", "data:image/png;base64,AAAA")
    bad = {
        "BadRequestError": case(hello, top_p=7.0),
        "AuthenticationError": case(hello) | {"key": "wrong"},
        "APIError": case(broken),  # 422, which LiteLLM has no name of its own for
    }
    found = talk(client, server.url, [*good.values(), *bad.values()])
    for (name, asked), got in zip(good.items(), found, strict=False):
        wanted = answers(pipe, asked)
        assert got.get("texts") == [answer.text for answer in wanted], (name, got)
        tokens = sum(answer.generate_token_len for answer in wanted)
        assert got["usage"] == [wanted[0].input_token_len, tokens], name
        if name == "logprobs":
            tables = zip(wanted[0].token_ids, wanted[0].logprobs or (), strict=True)
            assert got["logprobs"] == pytest.approx([t[i] for i, t in tables], rel=1e-3)
    for kind, got in zip(bad, found[len(good) :], strict=True):
        assert kind in got.get("error", ()), got


def talk(client: str, url: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the client says of each case."""
    assert PYTHON.exists(), "make test-nightly makes the environment of other clients"
    done = subprocess.run(
        [PYTHON, ROOT / "tests/other_clients.py", client],
        input=json.dumps({"url": url, "cases": cases}),
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # fetches no price list
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
