"""Clients that people use beside OpenAI's own. Once a night: they are large.

`make test-nightly` installs what these need (the extra `nightly`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from running_server import Running, running
from vlmforge import GenerationConfig, Pipeline, pipeline
from vlmforge.server.settings import server_vision_config

pytestmark = pytest.mark.nightly

QUESTION = "what is this?"
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False)


@pytest.fixture(scope="module")
def pipe(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, vision_config=server_vision_config()) as made:
        yield made


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Running]:
    with running([("tiny", pipe)]) as made:
        yield made


def messages() -> list[dict[str, object]]:
    import base64
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return [{"role": "user", "content": parts}]


def wanted(pipe: Pipeline) -> str:
    answer = pipe(messages(), GREEDY)
    assert not isinstance(answer, list)
    return answer.text


def test_langchain(server: Running, pipe: Pipeline) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=12
    )
    assert model.invoke(messages()).content == wanted(pipe)
    pieces = [piece.content for piece in model.stream(messages())]
    assert "".join(map(str, pieces)) == wanted(pipe)


def test_litellm(server: Running, pipe: Pipeline) -> None:
    import litellm

    given = {
        "model": "openai/tiny",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "messages": messages(),
        "temperature": 0,
        "max_tokens": 12,
    }
    assert litellm.completion(**given).choices[0].message.content == wanted(pipe)
    pieces = litellm.completion(**given, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted(pipe)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**(given | {"temperature": 9}))
