"""GenerationConfig: what it accepts, what it refuses, what it resolves to."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from vlmforge.errors import ConfigError
from vlmforge.outputs.generation_config import (
    REFUSALS,
    RULES,
    UNSET_TOP_K,
    GenerationConfig,
    GenerationPlan,
    TokenFacts,
)
from vlmforge.outputs.grammar import Guides

# The fields and defaults of both versions of the original; ours differ where marked.
ORIGINAL: dict[str, object] = {
    "n": 1,
    "max_new_tokens": 512,
    "do_sample": None,  # False today, absent in 0.4.2
    "top_p": 1.0,
    "top_k": 1,  # of 0.4.2
    "min_p": 0.0,
    "temperature": 0.8,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "random_seed": None,
    "stop_words": None,
    "bad_words": None,
    "stop_token_ids": None,
    "bad_token_ids": None,
    "min_new_tokens": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "logprobs": None,
    "response_format": None,
    "logits_processors": None,
    "output_logits": None,
    "output_last_hidden_state": None,
    "include_stop_str_in_output": False,
    "return_ppl": False,
    "with_cache": False,
    "preserve_cache": False,
    "migration_request": None,
    "return_routed_experts": False,
    "repetition_ngram_size": 0,
    "repetition_ngram_threshold": 0,
    "logprob_start_len": -1,
    "presence_penalty": 0.0,  # of OpenAI's API
    "frequency_penalty": 0.0,  # of OpenAI's API
}


def encode(text: str) -> Sequence[int]:
    return [ord(char) - 32 for char in text]


FACTS = TokenFacts(
    vocab_size=100,
    eos_ids=(2,),
    template_stop_words=("###", "<|end|>"),
    special_tokens={"</s>": 2, "<|end|>": 7, "<|pad|>": 9},
    encode=encode,
    guides=Guides("", 100, (2,)),
)


def resolve(**fields: Any) -> GenerationPlan:
    return GenerationConfig(**fields).resolved(FACTS)


def identity(ids: list[int], logits: np.ndarray) -> np.ndarray:
    return logits


def test_fields_and_defaults_are_the_originals() -> None:
    config = GenerationConfig()
    assert {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} == ORIGINAL


def test_every_field_is_checked_or_refused() -> None:
    assert set(RULES) | set(REFUSALS) | {"response_format"} == set(ORIGINAL)


def test_only_the_two_fields_that_never_moved_are_positional() -> None:
    assert GenerationConfig(1, 64).max_new_tokens == 64
    with pytest.raises(TypeError):
        GenerationConfig(1, 64, True)  # type: ignore[call-arg]


WRONG: list[tuple[str, object, str]] = [
    ("n", 0, "an integer in [1, 128]"),
    ("n", 129, "an integer in [1, 128]"),
    ("n", True, "an integer in [1, 128]"),
    ("max_new_tokens", 0, "a positive integer or None"),
    ("max_new_tokens", 5.0, "a positive integer or None"),
    ("do_sample", 1, "True or False or None"),
    ("top_p", 1.01, "a number in [0, 1]"),
    ("top_p", -0.1, "a number in [0, 1]"),
    ("top_p", math.nan, "a number in [0, 1]"),
    ("top_k", -1, "a non-negative integer"),
    ("top_k", 1.0, "a non-negative integer"),
    ("top_k", False, "a non-negative integer"),
    ("min_p", 1.5, "a number in [0, 1]"),
    ("temperature", 2.01, "a number in [0, 2]"),
    ("temperature", -1, "a number in [0, 2]"),
    ("temperature", True, "a number in [0, 2]"),
    ("temperature", "0.8", "a number in [0, 2]"),
    ("temperature", None, "a number in [0, 2]"),
    ("repetition_penalty", 0, "a number > 0"),
    ("repetition_penalty", -1.0, "a number > 0"),
    ("repetition_penalty", math.inf, "a number > 0"),
    ("repetition_penalty", 10**400, "a number > 0"),
    ("ignore_eos", 1, "True or False"),
    ("random_seed", -1, "a non-negative integer or None"),
    ("random_seed", 1.5, "a non-negative integer or None"),
    ("stop_words", "###", "a list whose every item is a non-empty string or None"),
    ("stop_words", [""], "a list whose every item is a non-empty string or None"),
    ("stop_words", [1], "a list whose every item is a non-empty string or None"),
    ("bad_words", ["a", None], "a list whose every item is a non-empty string or None"),
    ("stop_token_ids", [-1], "a list whose every item is a non-negative integer or None"),
    ("stop_token_ids", 2, "a list whose every item is a non-negative integer or None"),
    ("bad_token_ids", ["2"], "a list whose every item is a non-negative integer or None"),
    ("min_new_tokens", -1, "a non-negative integer or None"),
    ("skip_special_tokens", None, "True or False"),
    ("spaces_between_special_tokens", 0, "True or False"),
    ("logprobs", 1025, "an integer in [0, 1024] or None"),
    ("logprobs", True, "an integer in [0, 1024] or None"),
    ("logits_processors", identity, "a list whose every item is a callable or None"),
    ("logits_processors", [1], "a list whose every item is a callable or None"),
    ("output_logits", "prompt", "one of 'all', 'generation' or None"),
    ("output_logits", True, "one of 'all', 'generation' or None"),
    ("include_stop_str_in_output", 1, "True or False"),
    ("return_ppl", 1, "True or False"),
    ("repetition_ngram_size", -1, "a non-negative integer"),
    ("repetition_ngram_threshold", -2, "a non-negative integer"),
]


@pytest.mark.parametrize(("field", "value", "expected"), WRONG)
def test_a_wrong_value_is_named_found_and_told_what_is_expected(
    field: str, value: Any, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationConfig(**{field: value})
    assert caught.value.summary == f"GenerationConfig: {field} must be {expected}."
    assert (caught.value.found, caught.value.expected) == (f"{field}={value!r}", expected)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("field", "value", "expected"), WRONG)
def test_a_value_assigned_later_is_checked_when_a_request_uses_it(
    field: str, value: Any, expected: str
) -> None:
    config = GenerationConfig()
    setattr(config, field, value)
    with pytest.raises(ConfigError, match=f"{field} must be"):
        config.resolved(FACTS)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("output_last_hidden_state", "all", "output_logits"),
        ("with_cache", True, "leave it out"),
        ("preserve_cache", True, "leave it out"),
        ("migration_request", object(), "the engine itself"),
        ("return_routed_experts", True, "leave it out"),
        ("logprob_start_len", 0, "output_logits='all'"),
    ],
)
def test_what_is_not_supported_is_refused_with_what_to_do(
    field: str, value: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=f"GenerationConfig: {field} is not supported") as caught:
        GenerationConfig(**{field: value})
    assert words in caught.value.fix
    assert caught.value.found == f"{field}={value!r}"
    assert field in REFUSALS


def test_all_refusals_are_tried_above() -> None:
    assert len(REFUSALS) == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 2},
        {"temperature": np.float32(0.5), "top_k": np.int64(3), "max_new_tokens": np.int32(4)},
        {"top_p": 0},
        {"top_p": 1},
        {"top_k": 0},
        {"min_p": 1},
        {"repetition_penalty": 1e-3},
        {"max_new_tokens": None, "min_new_tokens": 10_000},
        {"max_new_tokens": 5, "min_new_tokens": 5},
        {"random_seed": 2**64 - 1},
        {"logprobs": 1024},
        {"logprobs": 0},
        {"stop_words": (), "bad_words": [], "stop_token_ids": (1, 2)},
        {"logits_processors": [identity]},
        {"output_logits": "all"},
        {"repetition_ngram_size": 3, "repetition_ngram_threshold": 2},
    ],
)
def test_the_ends_of_the_ranges_are_fine(fields: dict[str, Any]) -> None:
    resolve(**fields)


def test_fields_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_new_tokens must not be above") as caught:
        GenerationConfig(max_new_tokens=4, min_new_tokens=5)
    assert caught.value.found == "min_new_tokens=5, max_new_tokens=4"
    for field in ("repetition_ngram_size", "repetition_ngram_threshold"):
        only: dict[str, Any] = {field: 3}
        with pytest.raises(ConfigError, match="go together"):
            GenerationConfig(**only)


@pytest.mark.parametrize(
    ("fields", "greedy", "top_k"),
    [
        ({}, True, 1),
        ({"top_k": 1, "temperature": 1.5, "top_p": 0.5}, True, 1),
        ({"temperature": 0.7, "top_p": 0.9}, True, 1),
        ({"top_k": 40, "top_p": 0.8, "temperature": 0.6}, False, 40),
        ({"top_k": 0}, False, 0),
        ({"top_k": 40, "temperature": 0}, True, 40),
        ({"top_k": 40, "top_p": 0}, True, 40),
        ({"do_sample": False, "top_k": 40}, True, 40),
        ({"do_sample": True}, False, UNSET_TOP_K),
        ({"do_sample": True, "top_k": 1}, False, UNSET_TOP_K),
        ({"do_sample": True, "top_k": 5}, False, 5),
        ({"do_sample": True, "top_k": 0}, False, 0),
        ({"do_sample": True, "temperature": 0}, True, UNSET_TOP_K),
        ({"do_sample": True, "top_p": 0.0}, True, UNSET_TOP_K),
    ],
)
def test_greedy_unless_asked(fields: dict[str, Any], greedy: bool, top_k: int) -> None:
    plan = resolve(**fields)
    assert GenerationConfig(**fields).greedy == plan.sampling.greedy == greedy
    assert plan.sampling.top_k == top_k


def test_all_fields_of_sampling_reach_the_plan() -> None:
    sampling = resolve(
        top_k=40,
        top_p=0.8,
        min_p=0.1,
        temperature=0.6,
        repetition_penalty=1.2,
        random_seed=11,
        logprobs=5,
        logits_processors=[identity],
        min_new_tokens=3,
        stop_token_ids=[4],
    ).sampling
    assert (sampling.top_p, sampling.min_p, sampling.temperature) == (0.8, 0.1, 0.6)
    assert (sampling.repetition_penalty, sampling.seed, sampling.logprobs) == (1.2, 11, 5)
    assert sampling.logits_processors == (identity,)
    assert (sampling.held_ids, sampling.min_new_tokens) == ((2, 4, 7), 3)


def test_the_rest_of_the_fields_reach_the_plan() -> None:
    plan = resolve(
        max_new_tokens=None,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        output_logits="generation",
        return_ppl=True,
        include_stop_str_in_output=True,
        min_new_tokens=3,
        repetition_ngram_size=4,
        repetition_ngram_threshold=2,
    )
    assert plan == structs.replace(
        resolve(),
        sampling=plan.sampling,
        stop=plan.stop,
        max_new_tokens=None,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        output_logits="generation",
        return_ppl=True,
    )
    assert (plan.stop.include_stop_str_in_output, plan.stop.min_new_tokens) == (True, 3)
    assert (plan.stop.ngram_size, plan.stop.ngram_threshold) == (4, 2)


def test_stop_words_add_to_the_templates_and_special_ones_stop_by_id() -> None:
    stop = resolve(stop_words=["</s>", "Human:", "<|pad|>", "###"], stop_token_ids=[5]).stop
    assert stop.ids == {2, 5, 7, 9}
    assert stop.words == ("Human:", "###")
    assert resolve().stop.ids == {2, 7}
    assert resolve().stop.words == ("###",)


def test_ignore_eos_leaves_only_what_the_user_asked_for() -> None:
    stop = resolve(ignore_eos=True, stop_words=["Human:", "<|pad|>"], stop_token_ids=[5]).stop
    assert stop.ids == {5, 9}
    assert stop.words == ("Human:",)
    plan = resolve(ignore_eos=True, min_new_tokens=4)
    assert (plan.stop.ids, plan.stop.words, plan.sampling.held_ids) == (frozenset(), (), ())


def test_bad_words_are_banned_at_the_start_and_after_a_space() -> None:
    sampling = resolve(bad_words=["!", "ab"], bad_token_ids=[1, 3]).sampling
    assert sampling.bad_words == (
        (1,),
        (3,),
        (0, 1),
        (ord("a") - 32, ord("b") - 32),
        (0, ord("a") - 32, ord("b") - 32),
    )


@pytest.mark.parametrize("field", ["stop_token_ids", "bad_token_ids"])
def test_an_id_outside_the_vocabulary_is_refused(field: str) -> None:
    assert resolve(**{field: [99]})
    with pytest.raises(ConfigError, match=f"{field} has an id that the engine") as caught:
        resolve(**{field: [3, 100]})
    assert (caught.value.found, caught.value.expected) == ("100", "ids in [0, 99]")


@given(
    st.lists(st.sampled_from(["x", "###", "</s>"]), max_size=3),
    st.lists(st.integers(0, 99), max_size=3),
    st.one_of(st.none(), st.integers(0, 9)),
)
def test_a_config_is_never_changed_and_a_plan_does_not_follow_it(
    words: list[str], ids: list[int], seed: int | None
) -> None:
    config = GenerationConfig(
        stop_words=words, bad_words=words, stop_token_ids=ids, bad_token_ids=ids, random_seed=seed
    )
    before = copy.deepcopy(config)
    plan = config.resolved(FACTS)
    assert config == before
    kept = copy.deepcopy(plan)
    words.append("more")
    ids.append(50)
    config.top_k = 40
    assert plan == kept
    assert config.resolved(FACTS) != kept
    with pytest.raises(AttributeError):
        plan.max_new_tokens = 1  # type: ignore[misc]
