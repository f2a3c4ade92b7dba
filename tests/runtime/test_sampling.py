"""Sampling, against definitions spelt out in loops and against another implementation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec import structs
from transformers.generation import logits_process as theirs

from vlmforge.errors import ConfigError, EngineError
from vlmforge.outputs.logprobs import mean_cross_entropy, top_ids, top_logprobs
from vlmforge.outputs.sampling import Sampler, SamplingParams, distribution

SAMPLED = SamplingParams(greedy=False)
INF = math.inf


class FixedDraws:
    """Stands in for a random generator: gives the numbers it was made with."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self._numbers = iter(numbers)

    def random(self) -> float:
        return next(self._numbers)


def fixed(numbers: Sequence[float]) -> np.random.Generator:
    return cast("np.random.Generator", FixedDraws(numbers))


def row(values: Sequence[float]) -> np.ndarray:
    """Logits that nobody may write to."""
    logits = np.array(values, np.float32)
    logits.setflags(write=False)
    return logits


def of_probs(values: Sequence[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return row(np.log(np.array(values)))


def dense(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    ids, probs = distribution(logits, params)
    assert len(set(ids.tolist())) == len(ids)
    assert (probs > 0).all()
    whole = np.zeros(len(logits))
    whole[ids] = probs
    return whole


def by_definition(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Temperature, top-k, softmax, top-p, min-p, renormalise, one token at a time."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: params.top_k] if params.top_k else order
    peak = logits[order[0]]
    weights = {i: math.exp((logits[i] - peak) / params.temperature) for i in order}
    total = math.fsum(weights.values())
    probs = {i: weights[i] / total for i in order}
    kept: list[int] = []
    mass = 0.0
    for i in order:
        assume(abs(mass - params.top_p) > 1e-9)
        if kept and mass >= params.top_p and params.top_p < 1:
            break
        kept.append(i)
        mass += probs[i]
    assume(
        all(abs(probs[i] - params.min_p * probs[order[0]]) > 1e-12 or i == order[0] for i in kept)
    )
    kept = [i for i in kept if probs[i] >= params.min_p * probs[order[0]]]
    total = math.fsum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(logits))]


LOGITS = st.lists(
    st.one_of(st.integers(-24, 24).map(lambda i: i / 4), st.just(-INF)), min_size=1, max_size=12
).filter(lambda values: max(values) > -INF)
PARAMS = st.builds(
    SamplingParams,
    greedy=st.just(False),
    temperature=st.sampled_from([1e-3, 0.3, 0.8, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1.0),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)


@given(LOGITS, PARAMS)
def test_the_distribution_is_that_of_the_definition(
    logits: list[float], params: SamplingParams
) -> None:
    expected = by_definition(logits, params)
    np.testing.assert_allclose(dense(row(logits), params), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [5 / 7, 2 / 7, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_k": 99}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        # The token that crosses the boundary is kept whole; 0 keeps the first.
        ({"top_p": 0.6}, [5 / 7, 2 / 7, 0, 0, 0]),
        ({"top_p": 0.72}, [0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"top_p": 0.0}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.35}, [5 / 7, 2 / 7, 0, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        # top-p looks at what top-k left and renormalised: 0.5/0.85 < 0.6 needs the second.
        ({"top_k": 3, "top_p": 0.58}, [1, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [5 / 7, 2 / 7, 0, 0, 0]),
        # Temperature comes before top-p: squared, 0.25 of 0.325 is 0.77.
        ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0, 0]),
    ],
)
def test_examples_by_hand(changes: dict[str, Any], expected: list[float]) -> None:
    logits = of_probs([0.5, 0.2, 0.15, 0.1, 0.05])
    probs = dense(logits, structs.replace(SAMPLED, **changes))
    np.testing.assert_allclose(probs, np.array(expected), atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_same_tokens_survive_as_in_another_implementation(seed: int) -> None:
    """Settings as people use them, over a vocabulary of a usual size."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 5000).astype(np.float32)
    params = structs.replace(
        SAMPLED,
        temperature=(0.6, 1.3)[seed % 2],
        top_k=(0, 40)[seed // 2 % 2],
        top_p=(0.8, 0.95)[seed // 4],
        min_p=(0.0, 0.05)[seed % 2],
    )
    chain: list[theirs.LogitsProcessor] = [theirs.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        chain.append(theirs.TopKLogitsWarper(params.top_k))
    chain.append(theirs.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(theirs.MinPLogitsWarper(params.min_p))
    scores = torch.from_numpy(logits)[None].double()
    for warper in chain:
        scores = warper(torch.zeros(1, 0, dtype=torch.long), scores)
    expected = scores.softmax(-1)[0].numpy()
    np.testing.assert_allclose(dense(logits, params), expected, atol=1e-7)


@given(LOGITS, st.sampled_from([5e-324, 1e-300, 1e-30]))
def test_no_temperature_is_too_small(logits: list[float], temperature: float) -> None:
    best = [i for i, value in enumerate(logits) if value == max(logits)]
    probs = dense(row(logits), structs.replace(SAMPLED, temperature=temperature))
    np.testing.assert_allclose(probs[best], 1 / len(best))


@given(LOGITS, st.integers(1, 14))
def test_top_ids_is_a_stable_sort(logits: list[float], count: int) -> None:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert top_ids(row(logits), count).tolist() == order[:count]


def test_a_draw_hits_each_token_as_often_as_its_probability_says() -> None:
    probs = [0.25, 0.0, 0.5, 0.125, 0.125]
    draws = [(i + 0.5) / 64 for i in range(64)]
    sampler = Sampler(SAMPLED, 5, rng=fixed(draws))
    counts = Counter(sampler.step(of_probs(probs)).id for _ in draws)
    assert counts == {0: 16, 2: 32, 3: 8, 4: 8}


def test_a_draw_on_a_boundary_belongs_to_the_token_after_it() -> None:
    sampler = Sampler(SAMPLED, 4, rng=fixed([0.0, 0.25, 0.5, 0.75]))
    assert [sampler.step(row([0.0] * 4)).id for _ in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("probs", [[0.0, 0.3, 0.3, 0.4, 0.0], [0.0, 0.1, 0.1, 0.1, 0.0]])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(probs: list[float]) -> None:
    sampler = Sampler(SAMPLED, 5, rng=fixed([0.0, 1 - 2**-53]))
    assert [sampler.step(of_probs(probs)).id for _ in range(2)] == [1, 3]


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    assert Sampler(SamplingParams(), 4).step(row([1, 3, 3, -INF])).id == 1


def ids_of(seed: int | None, steps: int = 40) -> list[int]:
    sampler = Sampler(structs.replace(SAMPLED, seed=seed), 50)
    return [sampler.step(row([0.0] * 50)).id for _ in range(steps)]


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    assert ids_of(7) == ids_of(7)
    assert ids_of(7) != ids_of(8)
    assert ids_of(None) != ids_of(None)


def test_a_session_goes_on_with_its_generator() -> None:
    first = Sampler(structs.replace(SAMPLED, seed=7), 50)
    ids = [first.step(row([0.0] * 50)).id for _ in range(20)]
    second = Sampler(structs.replace(SAMPLED, seed=7), 50, rng=first.rng)
    ids += [second.step(row([0.0] * 50)).id for _ in range(20)]
    assert ids == ids_of(7)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=6),
    st.lists(st.integers(0, 5), max_size=8),
    st.sampled_from([0.01, 0.5, 1.2, 10.0]),
)
def test_the_penalty_is_that_of_another_implementation(
    logits: list[float], prompt: list[int], penalty: float
) -> None:
    """Once for each distinct id of the prompt, both signs; generated ids join the prompt's."""
    sampler = Sampler(SamplingParams(repetition_penalty=penalty, logprobs=6), 6, prompt)
    processor = theirs.RepetitionPenaltyLogitsProcessor(penalty)
    seen = list(prompt)
    for _ in range(3):
        token = sampler.step(row(logits))
        history = torch.tensor([seen], dtype=torch.long)
        expected = processor(history, torch.tensor([logits])).log_softmax(-1)[0]
        assert token.top_logprobs is not None
        got = [token.top_logprobs[i] for i in range(6)]
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-5)
        seen.append(token.id)


def test_bad_words_of_one_and_of_many_tokens() -> None:
    params = SamplingParams(bad_words=((5,), (4, 3), (4, 4, 2)))
    sampler = Sampler(params, 6, prompt_ids=[4])
    # 5 is never taken; the prompt's 4 does not count; 4 3 is banned; after 4 4 also 2 is.
    falling = row([0, 1, 2, 3, 4, 5])
    assert sampler.step(row([0, 1, 2, 9, 4, 5])).id == 3
    assert sampler.step(falling).id == 4
    assert sampler.step(row([0, 1, 2, 9, 4, 5])).id == 4
    assert sampler.step(row([0, 1, 8, 9, 4, 5])).id == 4
    assert sampler.step(row([0, 1, 8, 9, 0, 5])).id == 1


def test_end_tokens_are_masked_until_the_minimum() -> None:
    sampler = Sampler(SamplingParams(held_ids=(2, 3), min_new_tokens=2), 4)
    assert [sampler.step(row([0, 1, 2, 3])).id for _ in range(3)] == [1, 1, 3]


def test_processors_come_first_in_order_and_see_all_ids() -> None:
    calls: list[tuple[list[int], list[float]]] = []

    def negate(ids: list[int], logits: np.ndarray) -> np.ndarray:
        calls.append((list(ids), logits.tolist()))
        ids.append(99)
        logits *= -1
        return logits

    def shift(ids: list[int], logits: np.ndarray) -> np.ndarray:
        calls.append((list(ids), logits.tolist()))
        return (logits + 1).astype(np.float64)

    params = SamplingParams(logits_processors=(negate, shift), repetition_penalty=2.0)
    sampler = Sampler(params, 3, prompt_ids=[0, 1])
    # -> [4, 3, -1]; then ids 0 and 1 are halved: [2, 1.5, -1].
    assert sampler.step(row([-3, -2, 2])).id == 0
    # -> [4, 1.5, 3]; halved: [2, 0.75, 3]: 2 wins although 0 led before the penalty.
    assert sampler.step(row([-3, -0.5, -2])).id == 2
    assert calls == [
        ([0, 1], [-3, -2, 2]),
        ([0, 1], [3, 2, -2]),
        ([0, 1, 0], [-3, -0.5, -2]),
        ([0, 1, 0], [3, 0.5, 2]),
    ]


def test_a_processor_that_keeps_its_result_cannot_be_bitten() -> None:
    kept = np.array([3, 2, 1], np.float32)
    params = SamplingParams(logits_processors=(lambda ids, logits: kept,), bad_words=((0,),))
    assert Sampler(params, 3).step(row([0, 0, 0])).id == 1
    assert kept.tolist() == [3, 2, 1]


def test_logprobs_are_of_what_is_left_before_temperature_and_truncation() -> None:
    probs = [0.1, 0.4, 0.2, 0.3]
    params = structs.replace(SAMPLED, temperature=0.3, top_k=1, bad_words=((3,),), logprobs=2)
    token = Sampler(params, 4, rng=fixed([0.9])).step(of_probs(probs))
    assert token.id == 1
    assert token.top_logprobs is not None
    assert list(token.top_logprobs) == [1, 2]
    np.testing.assert_allclose(list(token.top_logprobs.values()), np.log([4 / 7, 2 / 7]), rtol=1e-6)
    assert token.logprob == token.top_logprobs[1]


@given(LOGITS, st.integers(1, 14), st.data())
def test_top_logprobs_has_the_chosen_token_and_no_banned_one(
    logits: list[float], count: int, data: st.DataObject
) -> None:
    allowed = [i for i, value in enumerate(logits) if value > -INF]
    chosen = data.draw(st.sampled_from(allowed))
    top = top_logprobs(row(logits), count, chosen)
    best = sorted(allowed, key=lambda i: (-logits[i], i))[:count]
    assert list(top) == best + [chosen] * (chosen not in best)
    expected = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    np.testing.assert_allclose(list(top.values()), expected[list(top)], atol=1e-9)


def test_without_logprobs_none_are_reported() -> None:
    token = Sampler(SamplingParams(), 2).step(row([0, 1]))
    assert (token.logprob, token.top_logprobs) == (None, None)


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED, SamplingParams(bad_words=((1,),))])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_logits_that_are_not_finite_are_an_error_of_the_engine(
    params: SamplingParams, bad: float
) -> None:
    for place in range(3):
        values = [0.0, 1.0, -INF]
        values[place] = bad
        with pytest.raises(EngineError, match="not finite") as caught:
            Sampler(params, 3).step(row(values))
        assert caught.value.found == str(bad)
        assert "vlmforge verify" in caught.value.fix


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED])
def test_all_tokens_banned_is_an_error(params: SamplingParams) -> None:
    params = structs.replace(params, bad_words=((0,),), held_ids=(1,), min_new_tokens=1)
    with pytest.raises(ConfigError, match="Every token is banned") as caught:
        Sampler(params, 2).step(row([0, 1]))
    assert "bad_token_ids" in caught.value.found


@pytest.mark.parametrize("penalty", [1e-40, 1e-300])
def test_a_penalty_that_overflows_is_an_error(penalty: float) -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), 2, [1])
    with pytest.raises(ConfigError, match="after repetition_penalty") as caught:
        sampler.step(row([0, 1]))
    assert "nearer to 1" in caught.value.fix


@pytest.mark.parametrize(
    ("result", "found"),
    [(None, "NoneType of shape None"), (np.zeros(2), r"ndarray of shape \(2,\)")],
)
def test_a_processor_must_return_logits(result: object, found: str) -> None:
    def broken(ids: list[int], logits: np.ndarray) -> np.ndarray:
        return cast("np.ndarray", result)

    with pytest.raises(ConfigError, match="did not return logits") as caught:
        Sampler(SamplingParams(logits_processors=(broken,)), 3).step(row([0, 1, 2]))
    assert caught.match(found)


@pytest.mark.parametrize(
    ("params", "prompt", "what"),
    [
        (SamplingParams(), [-200], "the prompt"),
        (SamplingParams(bad_words=((1, 3),)), [], "bad words"),
        (SamplingParams(held_ids=(3,)), [], "stop tokens"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(
    params: SamplingParams, prompt: list[int], what: str
) -> None:
    with pytest.raises(ConfigError, match=f"An id of {what} is outside the vocabulary") as caught:
        Sampler(params, 3, prompt)
    assert caught.value.expected == "ids in [0, 2]"


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\)"):
        Sampler(SamplingParams(), 3).step(np.zeros((1, 3), np.float32))


def test_mean_cross_entropy_is_that_of_another_implementation() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (7, 30)).astype(np.float32)
    targets = [3, 29, 0, 0, 11, 5, 17]
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.tensor(targets))
    assert mean_cross_entropy(logits, targets) == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="zip"):
        mean_cross_entropy(logits, targets[1:])


@given(st.sampled_from([0.0, 0.5, 3, 30]), st.sampled_from([0.00101, 0.30001, 0.90001, 0.99991]))
def test_a_large_nucleus_is_that_of_sorting_all(spread: float, top_p: float) -> None:
    logits = (spread * np.random.default_rng(3).standard_normal(5000)).astype(np.float32)
    probs = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-probs, kind="stable")
    count = np.searchsorted(np.cumsum(probs[order]) / probs.sum(), top_p) + 1
    assert distribution(logits, SamplingParams(False, top_p=top_p))[0].tolist() == [*order[:count]]
