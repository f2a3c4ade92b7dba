"""Prompts that run in one step of the processor, one after the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from stand_in import Parts, at_once, plain, planned_steps, png, stand_in
from vlmforge import Pipeline, VisionConfig
from vlmforge.backends import FloatArray
from vlmforge.kv.cache import Copy
from vlmforge.runner.stages import Engine
from vlmforge.runner.step import Row, Step
from vlmforge.runner.work import Work

TEXTS = ["a", "b c d", "e f", "g h i j k"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    return planned_steps(monkeypatch)


def prompts(steps: list[Step]) -> list[int]:
    """How many run in each step that has some."""
    return [len(step.prompts) for step in steps if step.prompts]


def tokens(pipe: Pipeline, texts: list[str]) -> list[list[int] | None]:
    found = at_once(pipe, texts, plain(5))
    return [None if one.error_code else one.token_ids for one in found]


def test_they_answer_as_alone_and_no_step_waits_for_the_next_prompt(steps: list[Step]) -> None:
    with stand_in(Parts(4), slots=4) as pipe:
        alone = [tokens(pipe, [text]) for text in TEXTS]
        steps.clear()
        assert [[found] for found in tokens(pipe, TEXTS)] == alone
    assert prompts(steps) == [4]
    assert [len(step.decode) for step in steps] == [0, 4, 4, 4, 4]


def test_they_are_no_more_than_a_chunk(steps: list[Step]) -> None:
    with stand_in(Parts(4), slots=4, max_prefill_token_num=64) as pipe:
        lengths = [pipe.count_tokens(text) for text in TEXTS]
        assert max(lengths) <= 64 < sum(lengths)
        tokens(pipe, TEXTS)
    for step in steps:
        assert sum(len(row.tokens) for row in step.prompts) <= 64
    assert len(prompts(steps)) > 1


def test_one_that_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real, run = Engine.prefill, list[int]()

    def second_fails(engine: Engine, *given: Any, **more: Any) -> FloatArray:
        run.append(len(run))
        if len(run) == 2:
            raise RuntimeError("bad_alloc")
        return real(engine, *given, **more)

    with stand_in(Parts(4), slots=4) as pipe:
        whole = tokens(pipe, TEXTS)
        monkeypatch.setattr(Engine, "prefill", second_fails)
        assert tokens(pipe, TEXTS) == [whole[0], None, *whole[2:]]
        monkeypatch.undo()
        assert tokens(pipe, TEXTS) == whole


def test_who_begins_as_another_waits_for_it(steps: list[Step]) -> None:
    """What the first one computes is copied, not computed again."""
    same = "the same words at the beginning of each of them: "
    with stand_in(Parts(4), slots=4) as pipe:
        tokens(pipe, [f"{same}{text}" for text in TEXTS])
    assert prompts(steps) == [1, 3]


def pictures(*seeds: int) -> list[tuple[str, bytes]]:
    return [("look", png(seed)) for seed in seeds]


def test_none_waits_for_the_images_of_those_behind_it(steps: list[Step]) -> None:
    parts, called = Parts(3), list[str]()
    with stand_in(parts, slots=3, vision=VisionConfig(max_batch_size=1)) as pipe:
        pipe(pictures(9), plain(1))  # what they begin with is in the cache
        steps.clear()
        parts.before = lambda name, number: called.append(name)
        at_once(pipe, pictures(1, 2, 3), plain(1))
    assert prompts(steps) == [3]
    assert [name for name in called if name in ("encode", "step")] == ["encode", "step"] * 3


def test_an_image_of_two_of_them_is_encoded_once(steps: list[Step]) -> None:
    parts = Parts(2)
    with stand_in(parts, slots=2, enable_prefix_caching=False) as pipe:
        first, second = at_once(pipe, pictures(1, 1), plain(3))
    assert prompts(steps) == [2]
    assert parts.calls["encode"] == 1
    assert first.token_ids == second.token_ids


def test_an_image_that_cannot_be_encoded_is_the_fault_of_no_other(steps: list[Step]) -> None:
    parts, asked = Parts(3), pictures(1, 2, 3)

    def third_fails(name: str, number: int) -> None:
        if (name, number) == ("encode", 3):
            raise RuntimeError("bad_alloc")

    parts.before = third_fails
    with stand_in(parts, slots=3, vision=VisionConfig(max_batch_size=1)) as pipe:
        pipe(pictures(9), plain(1))
        steps.clear()
        found = at_once(pipe, asked, plain(3))
        alone = pipe(asked, plain(3))
    assert prompts(steps)[0] == 3
    assert isinstance(alone, list)
    told = [one.token_ids for one in found if one.error_code is None]
    assert len(told) == 2
    assert all(ids in [one.token_ids for one in alone] for ids in told)


def test_who_has_a_copy_of_what_could_not_be_copied_ends_too(steps: list[Step]) -> None:
    """The second goes on from the first one's place, the third from the second one's."""
    parts, same = Parts(3), "the same words at the beginning: "
    with stand_in(parts, slots=3) as pipe:
        for text in ("some " * 20, "other " * 20, f"{same}a"):
            pipe(text, plain(1))
        steps.clear()
        fails = parts.calls["copy"] + 1

        def copy_fails(name: str, number: int) -> None:
            if (name, number) == ("copy", fails):
                raise RuntimeError("bad_alloc")

        parts.before = copy_fails
        found = at_once(pipe, [f"{same}{text}" for text in "bcd"], plain(3))
        moves = [move for move in steps[0].moves if isinstance(move, Copy)]
        assert prompts(steps) == [3]
        assert [move.source for move in moves[1:]] == [moves[0].target]
        assert sorted(one.finish_reason or "" for one in found) == ["error", "error", "length"]


def test_a_place_that_was_written_again_is_whole() -> None:
    """What went wrong there before does not matter any more."""

    class Decoder:
        def move(self, move: Copy) -> None:
            if move.source == 0:
                raise RuntimeError("bad_alloc")

    row = Row(7, (1,), 4, (1,), "last")
    for second, lost in ((2, []), (0, [[row]])):
        moves = (Copy(0, 1, 4), Copy(second, 1, 4))
        work = Work(cast(Any, SimpleNamespace(decoder=Decoder())), cast(Any, None), {})
        assert [rows for rows, _ in work.move(Step(moves, None, (row,)))] == lost
