"""A pipeline whose decoder begins steps before others have ended answers as one that does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from late_parts import FirstParts, LateParts
from stand_in import Parts, answered, at_once, plain, png, settle, stand_in
from vlmforge import GenerationConfig, Response
from vlmforge.errors import EngineStepError
from vlmforge.scheduler.jobs import Jobs

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
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.5},
    {"repetition_penalty": 2.0, "temperature": 0.4, "top_k": 0, "do_sample": True},
    {"bad_words": ["the e", "s"]},
    {"logits_processors": [_processor]},
    {"logprobs": 2},
    {"n": 3},
    {"min_new_tokens": 1},
    {"output_logits": "all"},
    {"output_logits": "generation"},
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
    every = [answer for response in responses for answer in response.choices]
    logits = [None if r.logits is None else (r.logits.shape, r.logits.tobytes()) for r in every]
    told = [(r.index, r.choice, r.text, r.token_ids, r.finish_reason, r.logprobs) for r in every]
    return [*told, *logits, *(r.generate_token_len for r in every)]


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
    for parts in (Parts(3), LateParts(3, undecided), FirstParts(3, undecided)):
        with stand_in(parts, blocks=blocks, max_prefill_token_num=9) as pipe:
            found = answered(lambda pipe=pipe: at_once(pipe, prompts, configs))  # type: ignore[misc]
            settle(pipe)
            answers.append(said(found))
            assert pipe._scheduler._jobs._cache.held_blocks == 0  # type: ignore[attr-defined]
    assert answers[0] == answers[1] == answers[2]


class Held(LateParts):
    """Waits, and calls `look`, in the middle of its step of this number, while another is begun."""

    def __init__(self, number: int) -> None:
        super().__init__(3)
        self._number, self.look = number, lambda: None
        self.before = self._before

    def _before(self, name: str, number: int) -> None:
        if name == "step" and number == self._number:
            self.look()


def test_tokens_are_decoded_in_steps_that_overlap() -> None:
    parts = LateParts(3)
    with stand_in(parts) as pipe:
        at_once(pipe, ["a", "b c", "d"], [plain(10), plain(20), plain(30)])
        settle(pipe)
        assert not parts._queue
    # No row is run for an end that is foreseen, and nearly all are begun behind another step.
    assert sum(parts.rows) == 3 + 9 + 19 + 29
    assert sum(parts.begun) > 50


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"repetition_penalty": 2.0},
        {"do_sample": True, "temperature": 0.4, "top_k": 0, "random_seed": 3},
    ],
    ids=["likeliest", "penalty", "sampled"],
)
def test_what_follows_a_prompt_is_begun_before_its_token_is_known(way: dict[str, Any]) -> None:
    """Where the device chooses that too: with any way of choosing that it takes."""
    begun = []
    for parts in (LateParts(3), FirstParts(3)):
        with stand_in(parts) as pipe:
            pipe("b c", plain(10, **way))
            settle(pipe)
        begun.append((sum(parts.begun), parts.calls["begin_first"]))
    assert begun == [(8, 0), (9, 1)]  # of nine tokens behind the first


def test_who_needs_the_token_before_waits_for_it_alone() -> None:
    """A frequency that is counted: it takes every second step, and all others all of them."""
    parts = FirstParts(3)
    with stand_in(parts) as pipe:
        configs = [plain(20), plain(20, frequency_penalty=0.5), plain(20)]
        found = at_once(pipe, ["a", "b c", "d"], configs)
        settle(pipe)
    with stand_in(Parts(3)) as pipe:
        assert said(found) == said(at_once(pipe, ["a", "b c", "d"], configs))
    assert parts.begun.count(2) + parts.begun.count(3) >= 18


def test_a_stop_word_costs_one_row_that_nobody_sees() -> None:
    """It is found when the row behind has been begun; what that gives is dropped."""
    with stand_in(Parts(3)) as pipe:
        whole = pipe("a", plain(30))
        assert isinstance(whole, Response)
    word = whole.text[len(whole.text) // 2 :][:5]
    config = GenerationConfig(max_new_tokens=30, ignore_eos=True, stop_words=[word])
    rows = []
    for parts in (Parts(3), LateParts(3)):
        with stand_in(parts) as pipe:
            found = pipe("a", config)
            assert isinstance(found, Response)
            assert (found.text, found.finish_reason) == (
                whole.text[: whole.text.index(word)],
                "stop",
            )
            settle(pipe)
            rows.append(sum(parts.rows))
    assert rows[0] + 1 == rows[1]


@pytest.mark.parametrize("number", [5, 6, 7])
def test_a_cancel_ends_its_request_within_a_step(number: int) -> None:
    """And takes nothing from the other one."""
    parts = Held(number)
    with stand_in(parts) as pipe:
        jobs = pipe._scheduler._jobs

        def cancel() -> None:
            name = min(jobs._jobs)
            jobs._jobs[name][1].cancelled.set()

        parts.look = cancel
        first, second = at_once(pipe, ["a", "b"], [plain(40), plain(12)])
        settle(pipe)
        held = jobs._cache.held_blocks  # type: ignore[attr-defined]
    with stand_in(Parts(3)) as pipe:
        wanted = [pipe("a", plain(40)), pipe("b", plain(12))]
    assert first.finish_reason == "abort"
    assert 0 < len(first.token_ids) <= number
    assert first.token_ids == wanted[0].token_ids[: len(first.token_ids)]  # type: ignore[union-attr]
    assert second.token_ids == wanted[1].token_ids  # type: ignore[union-attr]
    assert held == 0


def test_closing_waits_for_what_was_begun() -> None:
    parts = Held(6)
    with stand_in(parts) as pipe:
        parts.look = pipe._scheduler.stop
        response = answered(lambda: pipe("a", plain(90)))
        assert isinstance(response, Response)
    assert response.finish_reason == "abort"
    assert not parts._queue
    assert parts.begun


def test_a_question_is_answered_when_nothing_runs() -> None:
    parts = LateParts(3)
    queued = []
    with stand_in(parts) as pipe:
        pieces = pipe.stream_infer("a", plain(60))
        for _ in range(5):
            next(pieces)
            queued.append(pipe._scheduler.ask(lambda _: len(parts._queue)))
        rest = list(pieces)
    assert queued == [0] * 5
    assert rest


def test_a_device_that_fails_while_the_next_step_runs_ends_each_request_once() -> None:
    parts = LateParts(3)
    with stand_in(parts) as pipe:

        def fail(name: str, number: int) -> None:
            if name == "step" and number >= 6:
                raise MemoryError("gone")

        parts.before = fail
        responses = at_once(pipe, ["a", "b", "c"], [plain(20)] * 3)
        assert [r.finish_reason for r in responses] == ["error"] * 3
        assert {r.error_code for r in responses} == {EngineStepError.code}
        parts.before = lambda name, number: None
        assert pipe("a", plain(9)).generate_token_len == 9  # type: ignore[union-attr]


def test_a_copy_that_fails_ends_whom_it_was_made_for_and_nobody_else() -> None:
    """Nothing is begun behind a step from which a row is missing."""
    ends = []
    for parts in (Parts(3), LateParts(3)):

        def fail(name: str, _: int) -> None:
            if name == "copy":
                raise MemoryError("gone")

        parts.before = fail
        with stand_in(parts, enable_prefix_caching=False) as pipe:
            found = at_once(pipe, ["x y z", "a"], [plain(30), plain(20, n=2)])
        ends.append([(a.finish_reason, len(a.token_ids)) for r in found for a in r.choices])
    assert ends[0] == ends[1] == [("length", 30), ("length", 20), ("error", 0)]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("function", ["begin", "note"])
def test_bookkeeping_that_fails_at_a_prompt_ends_all_its_answers(late: bool, function: str) -> None:
    parts = LateParts(3) if late else Parts(3)
    with stand_in(parts, enable_prefix_caching=False) as pipe:
        cache, jobs = pipe._scheduler._jobs._cache, pipe._scheduler._jobs

        def fail(*_: object, **__: object) -> None:
            raise MemoryError("gone")

        setattr(cache, function, fail)
        (found,) = answered(lambda: at_once(pipe, ["a"], [plain(9, n=2)]))
        assert [answer.finish_reason for answer in found.choices] == ["error"] * 2
        settle(pipe)
        assert jobs.idle


def test_what_is_written_over_moves_that_fail_tells_why() -> None:
    """The cache is a new one then: there is no place in it to be given back."""
    parts = Parts(3)
    with stand_in(parts) as pipe:
        pipe(["a", "b", "c"], plain(40))

        def fail(name: str, _: int) -> None:
            if name == "drop":
                raise MemoryError("gone")

        def write(asked: Jobs) -> bool:
            asked.settle()
            rows = {"key.0": np.zeros((1, 4, 1), np.int64)}
            return asked.write(np.arange(4, dtype=np.int64), b"", rows)

        parts.before = fail
        with pytest.raises(MemoryError, match="gone"):
            pipe._scheduler.ask(write)
