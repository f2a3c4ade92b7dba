"""Asks a server through LangChain or LiteLLM; a program for an environment that has them.

    python other_clients.py langchain|litellm

reads JSON on standard input, `{"url", "cases": [{"messages", "options", "stream"}]}`, and writes
for each case `{"texts", "usage"}` or, if it was refused, `{"error"}`: the kinds of the exception.
Imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from typing import Any

Case = dict[str, Any]


def with_langchain(url: str, case: Case) -> dict[str, Any]:
    from langchain_core.messages import convert_to_messages
    from langchain_openai import ChatOpenAI

    options = dict(case["options"])
    form = options.pop("response_format", None)
    model = ChatOpenAI(
        model="tiny",
        base_url=f"{url}/v1",
        api_key=case.get("key", "none"),
        max_retries=0,
        stream_usage=True,
        model_kwargs={} if form is None else {"response_format": form},
        **options,
    )
    messages = convert_to_messages(case["messages"])
    if case["stream"]:
        pieces = list(model.stream(messages))
        usage: Any = [piece.usage_metadata for piece in pieces if piece.usage_metadata][-1]
        texts = ["".join(str(piece.content) for piece in pieces)]
        return {"texts": texts, "usage": [usage["input_tokens"], usage["output_tokens"]]}
    (answers,) = model.generate([messages]).generations
    first = answers[0].message
    found = {"texts": [answer.message.content for answer in answers]}
    usage = first.usage_metadata
    found["usage"] = [usage["input_tokens"], usage["output_tokens"]]
    logprobs = first.response_metadata.get("logprobs")
    return found | {"logprobs": logprobs and [entry["logprob"] for entry in logprobs["content"]]}


def with_litellm(url: str, case: Case) -> dict[str, Any]:
    import litellm

    given: Any = {
        "model": "openai/tiny",
        "api_base": f"{url}/v1",
        "api_key": case.get("key", "none"),
        "messages": case["messages"],
        "max_retries": 0,
        **case["options"],
    }
    if case["stream"]:
        pieces = list(
            litellm.completion(**given, stream=True, stream_options={"include_usage": True})
        )
        texts = ["".join(p.choices[0].delta.content or "" for p in pieces if p.choices)]
        usage = [p.usage for p in pieces if getattr(p, "usage", None)][-1]
        return {"texts": texts, "usage": [usage.prompt_tokens, usage.completion_tokens]}
    found = litellm.completion(**given)
    logprobs = getattr(found.choices[0], "logprobs", None)
    return {
        "texts": [choice.message.content for choice in found.choices],
        "usage": [found.usage.prompt_tokens, found.usage.completion_tokens],
        "logprobs": logprobs and [entry.logprob for entry in logprobs.content],
    }


def main() -> None:
    asked = json.load(sys.stdin)
    ask = {"langchain": with_langchain, "litellm": with_litellm}[sys.argv[1]]
    found = []
    for case in asked["cases"]:
        try:
            found.append(ask(asked["url"], case))
        except Exception as error:  # noqa: BLE001 - its kind is what is asked for
            found.append({"error": [kind.__name__ for kind in type(error).__mro__]})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
