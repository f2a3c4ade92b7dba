"""From the body of a request to what a pipeline is asked.

Fields are those of OpenAI's API (https://platform.openai.com/docs/api-reference/chat/create) and,
by a client's `extra_body`, some of ours. What a field would change and cannot is refused by name:
nothing is ignored but what changes no answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from msgspec import Struct

from vlmforge.field_rules import Flag, Int, Number, OrNone, Rule, Text, shown
from vlmforge.inputs.pixel_range import KEYS
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.server.api_errors import ApiError, refused

_MOST_ANSWERS = 128


class Asked(Struct, frozen=True):
    """A request, checked.

    Attributes:
        model: The name that was asked for; None: the only one there is.
        prompt: As `pipe(...)` takes it.
        config: How to generate.
        templated: Whether the chat template is applied.
        stream: Pieces as they come, or the whole.
        usage: Whether a stream ends with the count of tokens.
        top_logprobs: How many of the likeliest tokens are reported; None: no log-probabilities.
        salt: Requests with another salt share no cache with this one.
    """

    model: str | None
    prompt: object
    config: GenerationConfig
    templated: bool
    stream: bool
    usage: bool
    top_logprobs: int | None
    salt: str | None


_COMMON: Mapping[str, Rule] = MappingProxyType(
    {
        "model": OrNone(Text()),
        "stream": OrNone(Flag()),
        "n": OrNone(Int(1, _MOST_ANSWERS)),
        "seed": OrNone(Int(-(2**63))),
        "temperature": OrNone(Number(0, 2)),
        "top_p": OrNone(Number(0, 1)),
        "presence_penalty": OrNone(Number(-2, 2)),
        "frequency_penalty": OrNone(Number(-2, 2)),
        "max_tokens": OrNone(Int(1)),
        "top_k": OrNone(Int(0)),
        "min_p": OrNone(Number(0, 1)),
        "repetition_penalty": OrNone(Number(0, above=True)),
        "min_tokens": OrNone(Int(0)),
        "ignore_eos": OrNone(Flag()),
        "skip_special_tokens": OrNone(Flag()),
        "include_stop_str_in_output": OrNone(Flag()),
        "salt": OrNone(Text()),
    }
)
_CHAT: Mapping[str, Rule] = MappingProxyType(
    {
        **_COMMON,
        "max_completion_tokens": OrNone(Int(1)),
        "logprobs": OrNone(Flag()),
        "top_logprobs": OrNone(Int(0, 20)),
    }
)
_TEXT: Mapping[str, Rule] = MappingProxyType({**_COMMON, "logprobs": OrNone(Int(0, 20))})
# They are read below.
_SHAPED = ("messages", "prompt", "stop", "stream_options", "response_format", "stop_token_ids")
# They change no answer.
_WITHOUT_EFFECT = frozenset(
    ["user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"]
)
_ABSENT: Mapping[str, tuple[tuple[object, ...], str]] = MappingProxyType(
    {
        "tools": ((None, []), "ask for JSON by response_format, and call the tool yourself"),
        "tool_choice": ((None, "none"), "leave it out"),
        "functions": ((None, []), "ask for JSON by response_format"),
        "function_call": ((None, "none"), "leave it out"),
        "logit_bias": ((None, {}), "leave it out"),
        "modalities": ((None, ["text"]), "leave it out: answers are text"),
        "audio": ((None,), "leave it out: answers are text"),
        "store": ((None, False), "leave it out: nothing is stored here"),
        "service_tier": ((None, "auto", "default"), "leave it out"),
        "reasoning_effort": ((None,), "leave it out"),
        "best_of": ((None, 1), "use n"),
        "echo": ((None, False), "put the prompt before the answer yourself"),
        "suffix": ((None, ""), "leave it out"),
    }
)
_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "stop_token_ids",
    "response_format",
)


def parse_chat(body: Mapping[str, object], most_images: int) -> Asked:
    """The body of `/v1/chat/completions`.

    Raises:
        ApiError, ConfigError: a field is missing, unknown, of a wrong type or out of range.
    """
    _check(body, _CHAT, required="messages")
    top = body.get("top_logprobs")
    wanted = bool(body.get("logprobs"))
    if top is not None and not wanted:
        raise _bad("top_logprobs", shown(top), "logprobs=true beside it", "set logprobs to true")
    return _asked(
        body,
        prompt=_messages(body["messages"], most_images),
        templated=True,
        longest=body.get("max_completion_tokens", body.get("max_tokens")),
        top_logprobs=_int(top) or 0 if wanted else None,
    )


def parse_completion(body: Mapping[str, object]) -> Asked:
    """The body of `/v1/completions`: text that goes to the model as it is.

    Raises: as `parse_chat`.
    """
    _check(body, _TEXT, required="prompt")
    prompt = body["prompt"]
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise _bad("prompt", shown(prompt)[:80], "a text", "send one request for each text")
    return _asked(
        body,
        prompt=prompt,
        templated=False,
        longest=body.get("max_tokens") or 16,  # OpenAI's default
        top_logprobs=_int(body.get("logprobs")),
    )


def parse_tokenize(body: Mapping[str, object], most_images: int) -> tuple[str | None, object, bool]:
    """The model, the prompt and whether it is templated, of `/v1/tokenize`.

    Raises:
        ApiError: neither messages nor a prompt, or both.
    """
    if ("messages" in body) == ("prompt" in body):
        raise _bad("messages", "both or neither of messages and prompt", "one of them", "send one")
    if unknown := sorted(set(body) - {"model", "messages", "prompt"}):
        raise _unknown(unknown[0], ("model", "messages", "prompt"))
    model, templated = body.get("model"), "messages" in body
    if not isinstance(model, str | None):
        raise _bad("model", shown(model)[:80], "a name", "see GET /v1/models")
    if templated:
        return model, _messages(body["messages"], most_images), True
    if not isinstance(body["prompt"], str):
        raise _bad("prompt", shown(body["prompt"])[:80], "a text", "send a text")
    return model, body["prompt"], False


def _asked(
    body: Mapping[str, object],
    *,
    prompt: object,
    templated: bool,
    longest: object,
    top_logprobs: int | None,
) -> Asked:
    given: dict[str, object] = {
        name: body[name] for name in _SAME_NAME if body.get(name) is not None
    }
    # As OpenAI's clients expect: sampled from all tokens, unless the temperature is 0.
    given = {"temperature": 1.0, "top_k": 0, "do_sample": True} | given
    if given["temperature"] == 0:
        given |= {"do_sample": False, "top_k": 1}
    given["max_new_tokens"] = longest
    if (seed := _int(body.get("seed"))) is not None:
        given["random_seed"] = seed % 2**63
    if (least := body.get("min_tokens")) is not None:
        given["min_new_tokens"] = least
    if body.get("stop") is not None:
        given["stop_words"] = _stop(body["stop"])
    if top_logprobs is not None:
        given["logprobs"] = max(1, top_logprobs)
    stream = bool(body.get("stream"))
    model, salt = body.get("model"), body.get("salt")
    return Asked(
        model=model if isinstance(model, str) else None,
        prompt=prompt,
        config=GenerationConfig(**given),  # type: ignore[arg-type] # checked there
        templated=templated,
        stream=stream,
        usage=_include_usage(body.get("stream_options"), stream=stream),
        top_logprobs=top_logprobs,
        salt=salt if isinstance(salt, str) else None,
    )


def _check(body: Mapping[str, object], rules: Mapping[str, Rule], *, required: str) -> None:
    for name, value in body.items():
        if name in rules:
            if not rules[name].admits(value):
                raise _bad(name, shown(value)[:200], str(rules[name]), "correct it or leave it out")
        elif name in _ABSENT:
            neutral, instead = _ABSENT[name]
            if not any(value == item and type(value) is type(item) for item in neutral):
                raise refused(
                    400,
                    f"{name} is not supported.",
                    found=f"{name}={shown(value)[:200]}",
                    expected="a request without it",
                    fix=instead,
                    param=name,
                )
        elif name not in _WITHOUT_EFFECT and name not in _SHAPED:
            raise _unknown(name, (required, *rules, *_SHAPED[2:]))
    if body.get(required) is None:
        raise _bad(required, "nothing", f"{required} in the body", "send it")


def _messages(given: object, most_images: int) -> Sequence[Mapping[str, object]]:
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise _bad("messages", shown(given)[:80], "a list of objects", "see OpenAI's API")
    if not given:
        raise _bad("messages", "an empty list", "at least one message", "send a question")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(given)]
    count = sum(
        part["type"] == "image_url"
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    )
    if count > most_images:
        raise _bad("messages", f"{count} images", f"at most {most_images}", "send fewer images")
    return messages


def _message(message: Mapping[str, object], where: str) -> dict[str, object]:
    if unknown := sorted(set(message) - {"role", "content", "name", "refusal"}):
        for name in unknown:
            if message[name] is not None:
                raise _bad(
                    f"{where}.{name}", shown(message[name])[:80], "role and content", "drop it"
                )
    role, content = message.get("role"), message.get("content")
    role = "system" if role == "developer" else role
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    return {"role": role, "content": content}


def _part(part: object, where: str) -> dict[str, object]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text":
        return {"type": "text", "text": part.get("text")}
    if isinstance(part, dict) and kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if isinstance(url, str) and url[:8].lower().startswith(("http://", "https://", "data:")):
            given = {**part, **image} if isinstance(image, dict) else part
            asked = {key: given[key] for key in KEYS if key in given}
            return {"type": "image_url", "image_url": {"url": url, **asked}}
        raise _bad(where, shown(url)[:80], "an http(s) or data URL", "upload it as a data URL")
    raise _bad(where, f"a part of type {shown(kind)[:80]}", "text or image_url", "send these only")


def _stop(given: object) -> list[str]:
    words = [given] if isinstance(given, str) else given
    if isinstance(words, list) and all(isinstance(word, str) and word for word in words):
        return words
    raise _bad("stop", shown(given)[:80], "a text, or a list of texts", "leave out empty ones")


def _include_usage(given: object, *, stream: bool) -> bool:
    if given is None:
        return False
    if not isinstance(given, dict) or not stream:
        raise _bad("stream_options", shown(given)[:80], "an object, of a stream", "leave it out")
    wanted = given.get("include_usage")
    if set(given) - {"include_usage", "include_obfuscation"} or not isinstance(wanted, bool | None):
        raise _bad("stream_options", shown(given)[:80], "{'include_usage': bool}", "send that")
    return bool(wanted)


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _bad(name: str, found: str, expected: str, fix: str) -> ApiError:
    return refused(
        400, f"{name} is not as it must be.", found=found, expected=expected, fix=fix, param=name
    )


def _unknown(name: str, known: Sequence[str]) -> ApiError:
    return refused(
        400,
        "The request has a field that is not known.",
        found=shown(name)[:80],
        expected=", ".join(known),
        fix="correct its name, or leave it out: nothing is ignored in silence",
        param=name[:80],
    )
