"""Answers that are held to a form, by a model with random weights that knows nothing of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from conftest import IMAGES
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from vlmforge.errors import ConfigError

TALL = str(IMAGES / "tall_300x900.png")


@pytest.fixture(scope="module")
def pipe(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, EngineConfig(max_batch_size=8)) as made:
        yield made


def drawn_schema(rng: np.random.Generator, depth: int = 2) -> dict[str, Any]:
    """A schema whose answers end: strings, numbers and lists are bounded."""
    kinds = ["integer", "string", "enum", "boolean", "null", "pattern", "const"]
    kind = str(rng.choice(kinds + ["object", "array", "anyOf"] * (depth > 0)))
    match kind:
        case "integer":
            low = int(rng.integers(-50, 50))
            return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(1, 99))}
        case "string":
            least = int(rng.integers(0, 3))
            return {"type": "string", "minLength": least, "maxLength": least + 4}
        case "enum":
            return {"enum": ["a cat", 'say "no"', 7, None][: int(rng.integers(1, 5))]}
        case "pattern":
            return {"type": "string", "pattern": r"^[a-c]{2,4}-\d\d$"}
        case "const":
            return {"const": "tail\\wind"}
        case "array":
            items = drawn_schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": 1, "maxItems": 3}
        case "anyOf":
            return {"anyOf": [drawn_schema(rng, depth - 1) for _ in range(2)]}
        case "object":
            names = ["name", "size of it", "ünï", "z"][: int(rng.integers(1, 5))]
            return {
                "type": "object",
                "properties": {name: drawn_schema(rng, depth - 1) for name in names},
                "required": names[: int(rng.integers(0, len(names) + 1))],
                "additionalProperties": False,
            }
        case _:
            return {"type": kind}


def config(response_format: dict[str, Any], **fields: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=400, response_format=response_format, **fields)


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def answers(pipe: Pipeline, configs: list[GenerationConfig]) -> list[Response]:
    responses = pipe([("What is it?", TALL)] * len(configs), gen_config=configs)
    assert isinstance(responses, list)
    return responses


@pytest.mark.parametrize("count", [80, pytest.param(200, marks=pytest.mark.nightly)])
def test_every_answer_is_of_its_schema(pipe: Pipeline, count: int) -> None:
    rng = np.random.default_rng(0)
    schemas = [drawn_schema(rng) for _ in range(count)]
    configs = [
        config(schema_format(schema), top_k=i % 2 * 40 + 1, temperature=2.0, random_seed=i)
        for i, schema in enumerate(schemas)
    ]
    for schema, response in zip(schemas, answers(pipe, configs), strict=True):
        assert response.finish_reason == "stop", (schema, response)
        jsonschema.validate(json.loads(response.text), schema)


def test_expressions_choices_and_objects(pipe: Pipeline) -> None:
    choices = ["yes", "no, it's not", 'a "quoted" \\ one', "größer"]
    sampled: dict[str, Any] = {"top_k": 40, "temperature": 2.0, "random_seed": 3}
    expression = {"type": "regex", "regex": r"[A-Z]{3}: (\d{2}|none)"}
    picked, matched, lmdeploys, free = answers(
        pipe,
        [
            config({"type": "choice", "choice": choices}, **sampled),
            config(expression, **sampled),
            config({"type": "regex_schema", "regex_schema": "(left|right)"}),
            config({"type": "text"}),
        ],
    )
    assert picked.text in choices
    assert re.fullmatch(r"[A-Z]{3}: (\d{2}|none)", matched.text)
    assert lmdeploys.text in ("left", "right")
    (unheld,) = answers(pipe, [GenerationConfig(max_new_tokens=400)])
    assert free.token_ids == unheld.token_ids


def test_a_form_in_a_batch_changes_nobody_else(pipe: Pipeline) -> None:
    free = GenerationConfig(max_new_tokens=20)
    held = config(schema_format({"type": "array", "items": {"type": "null"}, "maxItems": 5}))
    alone = answers(pipe, [free])[0].token_ids
    together = answers(pipe, [held, free, held, free])
    assert together[1].token_ids == together[3].token_ids == alone
    assert together[0].text == together[2].text


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "made-up"}, "made-up"),
        ({"type": "object", "if": {}}, "if"),
        ({"type": "string", "pattern": "a(?=b)"}, "look-ahead"),
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "https://example.org/elsewhere.json"}, "elsewhere"),
    ],
)
def test_what_cannot_be_held_to_is_refused(
    pipe: Pipeline, schema: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        pipe("hi", gen_config=config(schema_format(schema)))
    assert "response_format" in caught.value.summary
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": "{}"}},
        {"type": "regex"},
        {"type": "regex", "regex": 7},
        {"type": "choice", "choice": []},
        {"type": "choice", "choice": ["a", 7]},
        {"type": "choice", "choice": "abc"},
        "json",
    ],
)
def test_unknown_forms_are_refused_when_the_config_is_made(given: Any) -> None:
    with pytest.raises(ConfigError, match="response_format"):
        GenerationConfig(response_format=given)


def test_a_form_needs_an_end() -> None:
    with pytest.raises(ConfigError, match="ignore_eos"):
        GenerationConfig(response_format={"type": "json_object"}, ignore_eos=True)
