"""Prompts that run together, and with others' tokens, on the processor in a GPU's place.

They lie one behind the other in one row, their first tokens are chosen by the device, and the next
step is begun before anybody else knows these: every answer is the one that it is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import HF, IMAGES, cuda_engine
from late_device import late_cuda_on_cpu
from stand_in import at_once
from vlmforge import EngineConfig, GenerationConfig, Response, pipeline
from vlmforge.api import memory
from vlmforge.backends.choice import Choice, Picked
from vlmforge.backends.cuda.choosing import TokenSampler
from vlmforge.backends.fake import cuda_on_cpu
from vlmforge.runner.work import Work

pytestmark = pytest.mark.usefixtures("patient_ranks")
PHOTO = str(IMAGES / "photo_640x480.png")
# Of each, the likeliest tokens are 0.05 ahead of the next ones: sums of another order change none.
PROMPTS: list[Any] = [
    "one",
    "Write one line about cats, and then another one about dogs, and one about both of them.",
    ("What is shown in this image?", PHOTO),
    "open the door please",
    "tell me more about it",
    ("tell me more about it", str(IMAGES / "tall_300x900.png")),
    "seven small stones",
    "the end of all of this",
]
WAYS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "top_k": 0, "temperature": 1.1, "random_seed": 7},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "do_sample": True, "temperature": 0.8, "random_seed": 2},
    {"frequency_penalty": 0.5},
    {"do_sample": True, "top_k": 40, "top_p": 0.8, "random_seed": 5, "logprobs": 2},
    {"n": 2, "do_sample": True, "random_seed": 9},
    {"output_logits": "generation"},
]
LIKELIEST = [GenerationConfig(max_new_tokens=5 + 2 * i, ignore_eos=True) for i in range(8)]
MANY_WAYS = [
    GenerationConfig(max_new_tokens=5 + 2 * i, ignore_eos=True, **way) for i, way in enumerate(WAYS)
]


def said(found: Sequence[Response]) -> list[Any]:
    return [[(a.token_ids, a.finish_reason) for a in response.choices] for response in found]


@pytest.fixture(scope="module")
def engine(shared: Path) -> Path:
    return cuda_engine(shared, HF.name)


@pytest.fixture(scope="module")
def alone(engine: Path) -> list[list[Any]]:
    return each_alone(engine)


def each_alone(engine: Path) -> list[list[Any]]:
    """What each prompt gives with nothing beside it, each step run and waited for."""
    found = []
    with cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=1)) as pipe:
        object.__setattr__(pipe._engine, "overlapping", None)
        for configs in (LIKELIEST, MANY_WAYS):
            answers = [pipe(p, gen_config=c) for p, c in zip(PROMPTS, configs, strict=True)]
            found.append(said(answers))  # type: ignore[arg-type]
    return found


def by_device(alone: list[list[Any]]) -> tuple[list[GenerationConfig], list[Any]]:
    """But for the one whose tokens are chosen here, as likely as can be."""
    return [*MANY_WAYS[:-1], LIKELIEST[-1]], [*alone[1][:-1], alone[0][-1]]


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Prompts and other rows of each step of the device's that has both."""
    noted: list[tuple[int, int]] = []
    real = Work.begin_mixed

    def begin(work: Work, prompts: Any, first: Any, rows: Any, *given: Any) -> Any:
        noted.append((len(prompts), len(rows)))
        return real(work, prompts, first, rows, *given)

    monkeypatch.setattr(Work, "begin_mixed", begin)
    yield noted


@pytest.mark.parametrize(
    ("late", "fields"),
    [(True, {}), (True, {"max_prefill_token_num": 37}), (False, {"max_batch_size": 3})],
    ids=str,
)
def test_answers_are_those_of_each_alone(
    engine: Path,
    alone: list[list[Any]],
    mixed: list[tuple[int, int]],
    late: bool,
    fields: dict[str, Any],
) -> None:
    config = EngineConfig(**{"max_batch_size": 5, "enable_prefix_caching": False, **fields})
    with late_cuda_on_cpu() if late else cuda_on_cpu(), pipeline(engine, config) as pipe:
        for configs, answers in (by_device(alone), (LIKELIEST, alone[0])):
            mixed.clear()
            assert said(at_once(pipe, PROMPTS, configs)) == answers
            assert mixed
        assert said(at_once(pipe, PROMPTS, MANY_WAYS)) == alone[1]


def test_ranks_take_prompts_and_tokens_in_one_step_too(
    shared: Path, mixed: list[tuple[int, int]]
) -> None:
    """Each is told of all rows, and first tokens that one of them chooses come to all."""
    engine = cuda_engine(shared, HF.name, "--tp", "2")
    alone = each_alone(engine)
    config = EngineConfig(max_batch_size=5, enable_prefix_caching=False, max_prefill_token_num=97)
    with late_cuda_on_cpu(), pipeline(engine, config) as pipe:
        for configs, answers in (by_device(alone), (LIKELIEST, alone[0])):
            mixed.clear()
            assert said(at_once(pipe, PROMPTS, configs)) == answers
            assert mixed
        assert said(at_once(pipe, PROMPTS, MANY_WAYS)) == alone[1]


def test_prompts_that_are_filled_up_give_the_same(
    engine: Path,
    alone: list[list[Any]],
    mixed: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of engines whose graphs are told where a row's tokens are, and of plans."""
    monkeypatch.setattr(memory, "packs", lambda _: False)
    with late_cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=5)) as pipe:
        assert not pipe._engine.options.packs
        assert said(at_once(pipe, PROMPTS, MANY_WAYS)) == alone[1]
    assert mixed == []


@pytest.mark.parametrize("mixing", [True, False])
def test_what_the_device_leaves_to_the_host_is_never_taken_for_a_token(
    engine: Path, alone: list[list[Any]], monkeypatch: pytest.MonkeyPatch, mixing: bool
) -> None:
    """Every third; the device has gone on, and whatever comes of that is dropped."""
    real, calls = TokenSampler._picked, [0]

    def undecided(
        sampler: TokenSampler, values: Any, row: int, choice: Choice | None
    ) -> Picked | None:
        calls[0] += 1
        return None if calls[0] % 3 == 0 else real(sampler, values, row, choice)

    monkeypatch.setattr(TokenSampler, "_picked", undecided)
    if not mixing:
        monkeypatch.setattr(Work, "mixes", lambda *_: False)
    with late_cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=5)) as pipe:
        configs, answers = by_device(alone)
        assert said(at_once(pipe, PROMPTS, configs)) == answers
    assert calls[0] > 20
