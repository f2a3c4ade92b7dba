"""A pipeline whose decoder begins steps before others have ended answers as one that does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from late_parts import LateParts
from stand_in import Parts, answered, at_once, png, settle, stand_in
from vlmforge import GenerationConfig, Response

PROMPTS: list[Any] = ["a", "a b", ("look", png(1)), "a b c d e f g", ("and", [png(1), png(2)])]
WORDS = [" a", "e", "the", "s", "in"]  # some of them occur in what the stand-in says


def _processor(_: list[int], logits: Any) -> Any:
    return np.roll(logits, 1)


KINDS: list[dict[str, Any]] = [
    {},
    {},
    {"temperature": 0.1, "top_p": 1.0, "top_k": 0, "do_sample": True},
    {"temperature": 0.3, "top_p": 1.0, "top_k": 0, "do_sample": True, "n": 2},
    {"repetition_penalty": 1.2},
    {"logits_processors": [_processor]},
    {"logprobs": 2},
    {"n": 3},
    {"min_new_tokens": 1},
]


@st.composite
def requests(draw: st.DrawFn) -> tuple[Any, GenerationConfig]:
    kind = dict(draw(st.sampled_from(KINDS)))
    if "do_sample" in kind:
        kind["random_seed"] = draw(st.integers(0, 99))
    words = draw(st.lists(st.sampled_from(WORDS), max_size=2, unique=True))
    ids = draw(st.lists(st.integers(3, 602), max_size=60))
    return draw(st.sampled_from(PROMPTS)), GenerationConfig(
        max_new_tokens=draw(st.integers(1, 24)),
        ignore_eos=True,
        stop_words=words or None,
        stop_token_ids=ids or None,
        **kind,
    )


def said(responses: Sequence[Response]) -> list[Any]:
    """All that must not depend on how steps are run."""
    every = [answer for response in responses for answer in response.choices or [response]]
    return [
        (r.index, r.choice, r.text, r.token_ids, r.finish_reason, r.generate_token_len, r.logprobs)
        for r in every
    ]


@given(
    st.lists(requests(), min_size=1, max_size=6),
    st.sampled_from([(16, 30), (4, 44), (8, 60)]),
    st.sampled_from([3, 1 << 60]),
)
@settings(max_examples=examples(30))
def test_answers_are_those_of_steps_one_after_the_other(
    asked: list[tuple[Any, GenerationConfig]], blocks: tuple[int, int], undecided: int
) -> None:
    prompts, configs = [prompt for prompt, _ in asked], [config for _, config in asked]
    answers = []
    for parts in (Parts(3), LateParts(3, undecided)):
        with stand_in(parts, blocks=blocks, max_prefill_token_num=9) as pipe:
            found = answered(lambda pipe=pipe: at_once(pipe, prompts, configs))  # type: ignore[misc]
            settle(pipe)
            answers.append(said(found))
            assert pipe._scheduler._jobs._cache.held_blocks == 0  # type: ignore[attr-defined]
    assert answers[0] == answers[1]
