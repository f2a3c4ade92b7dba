"""The official client of OpenAI against a server of ours: answers are those of `pipe()`."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image, ImageDraw

from image_server import Server, png
from running_server import Running, running
from vlmforge import GenerationConfig, Pipeline, pipeline
from vlmforge.server.settings import ServerSettings, server_vision_config

GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False)
Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pipe(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, vision_config=server_vision_config()) as made:
        yield made


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Running]:
    with running([("tiny", pipe)], ServerSettings(max_images=3)) as made:
        yield made


@pytest.fixture
def image_server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def picture(colour: str) -> str:
    image = Image.new("RGB", (60, 40), "white")
    ImageDraw.Draw(image).ellipse((10, 5, 45, 35), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user(*parts: str) -> dict[str, Any]:
    def part(text: str) -> dict[str, Any]:
        if text.startswith(("data:", "http")):
            return {"type": "image_url", "image_url": {"url": text, "detail": "low", "odd": 1}}
        return {"type": "text", "text": text}

    return {"role": "user", "content": [part(text) for text in parts]}


def ask(server: Running, messages: Messages, **given: Any) -> Any:
    given = {"temperature": 0, "max_tokens": 12} | given
    return server.client.chat.completions.create(
        model="tiny",
        messages=messages,
        **given,  # type: ignore[arg-type]
    )


PROMPTS: dict[str, Messages] = {
    "text": [{"role": "user", "content": "hello there"}],
    "picture": [user("what is this?", picture("red"))],
    "picture first": [user(picture("red"), "what is this?")],
    "several": [user(picture("red"), "and", picture("blue"), "which?")],
    "turns": [
        user(picture("red"), "what is this?"),
        {"role": "assistant", "content": "a ball"},
        user("of what colour?"),
    ],
    "system": [{"role": "system", "content": "be brief"}, user("hello")],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_are_those_of_the_pipeline(server: Running, pipe: Pipeline, name: str) -> None:
    found = ask(server, PROMPTS[name])
    wanted = pipe(PROMPTS[name], GREEDY)
    assert not isinstance(wanted, list)
    choice = found.choices[0]
    assert choice.message.content == wanted.text
    assert choice.finish_reason == wanted.finish_reason
    assert found.usage.prompt_tokens == wanted.input_token_len
    assert found.usage.completion_tokens == wanted.generate_token_len
    assert found.usage.total_tokens == wanted.input_token_len + wanted.generate_token_len


@pytest.mark.parametrize("name", PROMPTS)
def test_pieces_of_a_stream_are_the_whole(server: Running, pipe: Pipeline, name: str) -> None:
    chunks = list(ask(server, PROMPTS[name], stream=True, stream_options={"include_usage": True}))
    wanted = pipe(PROMPTS[name], GREEDY)
    assert not isinstance(wanted, list)
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == wanted.text
    reasons = [chunk.choices[0].finish_reason for chunk in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [wanted.finish_reason]
    assert last.choices == [] and last.usage.prompt_tokens == wanted.input_token_len
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_ends_with_its_reason(server: Running) -> None:
    chunks = list(ask(server, PROMPTS["text"], stream=True))
    assert all(len(chunk.choices) == 1 for chunk in chunks)


def test_a_picture_by_address(
    server: Running, pipe: Pipeline, image_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMFORGE_ALLOW_PRIVATE_URLS", "1")
    address = f"http://127.0.0.1:{image_server.server_address[1]}/image"
    data = "data:image/png;base64," + base64.b64encode(png()).decode()
    found = ask(server, [user("what?", address)])
    assert (
        found.choices[0].message.content
        == ask(server, [user("what?", data)]).choices[0].message.content
    )
    monkeypatch.delenv("VLMFORGE_ALLOW_PRIVATE_URLS")
    with pytest.raises(openai.UnprocessableEntityError, match="private address"):
        ask(server, [user("what?", address + "?again")])


def test_a_seed_answers_alike(server: Running) -> None:
    def text(seed: int) -> str:
        found = ask(server, PROMPTS["picture"], temperature=1.5, seed=seed)
        return str(found.choices[0].message.content)

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(server: Running, pipe: Pipeline, stream: bool) -> None:
    given = {"temperature": 1.2, "seed": 3, "n": 3}
    found = ask(server, PROMPTS["picture"], stream=stream, **given)
    texts = dict.fromkeys(range(3), "")
    for chunk in found if stream else [found]:
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    config = GenerationConfig(
        n=3, max_new_tokens=12, do_sample=True, top_k=0, temperature=1.2, random_seed=3
    )
    wanted = pipe(PROMPTS["picture"], config)
    assert not isinstance(wanted, list)
    assert [texts[i] for i in range(3)] == [choice.text for choice in wanted.choices]
    assert len(set(texts.values())) > 1
    if not stream:
        assert found.usage.completion_tokens == sum(
            choice.generate_token_len for choice in wanted.choices
        )


def test_penalties_reach_the_sampler(server: Running, pipe: Pipeline) -> None:
    given = {"frequency_penalty": 2.0, "presence_penalty": -1.0}
    found = ask(server, PROMPTS["picture"], max_tokens=30, **given)
    wanted = pipe(PROMPTS["picture"], GenerationConfig(max_new_tokens=30, do_sample=False, **given))
    assert not isinstance(wanted, list)
    assert found.choices[0].message.content == wanted.text


def test_a_salt_shares_nothing(server: Running) -> None:
    def cached(salt: str | None) -> int:
        turn = [user("salted or not", picture("purple"))]
        found = ask(server, turn, extra_body={"salt": salt})
        return int(found.usage.prompt_tokens_details.cached_tokens)

    assert cached("a") == 0
    assert cached("a") > 0
    assert cached("b") == 0


def test_stop_words_and_limits(server: Running, pipe: Pipeline) -> None:
    wanted = pipe(PROMPTS["text"], GREEDY)
    assert not isinstance(wanted, list)
    stop = wanted.text[4:7]
    found = ask(server, PROMPTS["text"], stop=[stop]).choices[0]
    assert found.message.content == wanted.text[: wanted.text.index(stop)]
    assert found.finish_reason == "stop"
    short = ask(server, PROMPTS["text"], max_tokens=None, max_completion_tokens=3)
    assert short.usage.completion_tokens == 3
    assert short.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(server: Running, pipe: Pipeline, stream: bool) -> None:
    given = ask(server, PROMPTS["picture"], logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in given] if stream else given.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    wanted = pipe(
        PROMPTS["picture"], GenerationConfig(max_new_tokens=12, do_sample=False, logprobs=2)
    )
    assert not isinstance(wanted, list) and wanted.logprobs is not None
    tables = zip(wanted.token_ids, wanted.logprobs, strict=True)
    assert [entry.logprob for entry in entries] == pytest.approx(
        [table[token] for token, table in tables], rel=1e-3
    )
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(bytes(entry.bytes).decode() == entry.token for entry in entries)
    text = "".join(entry.token for entry in entries)
    assert text.strip() == wanted.text.strip()


def test_json_of_a_schema(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    found = ask(server, PROMPTS["picture"], response_format=form, max_tokens=40)
    assert set(json.loads(found.choices[0].message.content)) == {"ok"}


def test_plain_completions(server: Running, pipe: Pipeline) -> None:
    found = server.client.completions.create(
        model="tiny", prompt="once upon", temperature=0, max_tokens=12, logprobs=1
    )
    wanted = pipe("once upon", GREEDY, do_preprocess=False)
    assert not isinstance(wanted, list)
    assert found.choices[0].text == wanted.text
    assert found.choices[0].logprobs is not None
    assert len(found.choices[0].logprobs.tokens or []) == wanted.generate_token_len
    pieces = server.client.completions.create(
        model="tiny", prompt="once upon", temperature=0, max_tokens=12, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == wanted.text


def test_the_second_turn_is_cached(server: Running) -> None:
    turn = [user("describe it well", picture("green"))]
    first = ask(server, turn)
    again = [*turn, {"role": "assistant", "content": first.choices[0].message.content}]
    second = ask(server, [*again, user("and now?")])
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_models_and_what_they_take(server: Running, pipe: Pipeline) -> None:
    (card,) = server.client.models.list().data
    found = card.model_dump()
    assert found["id"] == "tiny" and found["max_model_len"] == pipe.session_len
    assert found["modalities"]["input"] == ["text", "image"]
    assert found["image"]["tokens"] == pipe.manifest.decode.tokens_per_image
    assert server.client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("name", PROMPTS)
def test_tokenize_is_what_is_run(server: Running, pipe: Pipeline, name: str) -> None:
    body = {"model": "tiny", "messages": PROMPTS[name]}
    found = httpx.post(f"{server.url}/v1/tokenize", json=body).json()
    wanted = pipe.render(PROMPTS[name])
    assert found["tokens"] == list(wanted.token_ids) and found["text"] == wanted.text
    assert found["count"] == len(wanted.token_ids)
    assert [span["start"] for span in found["image_spans"]] == [
        span.start for span in wanted.image_spans
    ]
    written = {
        found["text"][span["text_start"] : span["text_end"]] for span in found["image_spans"]
    }
    assert written <= {pipe.manifest.prompt.image_placeholder}
