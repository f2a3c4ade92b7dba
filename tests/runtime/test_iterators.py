"""Prompts from an iterator, and how far a call has come."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from stand_in import Parts, answered, plain, stand_in
from vlmforge import Response
from vlmforge.api.calls import Call
from vlmforge.errors import ConfigError


def test_prompts_are_taken_as_they_are_needed() -> None:
    taken, ended = list[int](), 0

    def prompts() -> Iterator[object]:
        for number in range(300):
            taken.append(number)
            yield None if number == 7 else f"prompt {number}"

    with stand_in(slots=2) as pipe:
        for piece in pipe.stream_infer(prompts(), plain(1)):
            ended += piece.finish_reason is not None
            assert len(taken) <= ended + 4
        assert (ended, len(taken)) == (300, 300)
        listed, streamed = (
            pipe(make(f"prompt {number}" for number in range(5)), plain(3)) for make in (list, iter)
        )
        assert isinstance(listed, list)
        assert isinstance(streamed, list)
        assert [r.text for r in listed] == [r.text for r in streamed]
        assert [r.index for r in streamed] == [0, 1, 2, 3, 4]
        assert pipe(iter([])) == []


def test_an_iterator_that_fails_ends_the_call() -> None:
    parts = Parts(2)

    def prompts() -> Iterator[str]:
        yield from ("a", "b", "c", "d", "e")
        raise KeyError("mine")

    with stand_in(parts, slots=2) as pipe:
        with pytest.raises(KeyError, match="mine"):
            pipe(prompts(), plain(100))
        seen = len(parts.rows)
        assert isinstance(answered(lambda: pipe("probe", plain(20))), Response)
        assert set(parts.rows[seen + 1 :]) == {1}  # nothing runs beside it


def test_an_iterator_has_one_config_for_all() -> None:
    with stand_in(slots=1) as pipe, pytest.raises(ConfigError, match="does not fit") as caught:
        pipe(iter(["a"]), [plain(1)])
    assert caught.value.expected == "one GenerationConfig for all prompts"


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with stand_in(slots=2) as pipe:
        pipe(["a", None, "c"], plain(2, n=2), use_tqdm=True)
        listed = capsys.readouterr()
        pipe(iter(["a", "b"]), plain(2), use_tqdm=True)
        streamed = capsys.readouterr()
        pipe(["a"], plain(2))
        silent = capsys.readouterr()
    assert "3/3 [" in listed.err
    assert "2prompt [" in streamed.err
    assert (listed.out, streamed.out, *silent) == ("", "", "", "")


def test_a_call_that_blocks_takes_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although its next item finds room in the queue only while others are answered."""
    parts, looked, may_ask = Parts(3), [0], Call._may_ask

    def look(call: Call) -> bool:
        looked[0] += 1
        return may_ask(call)

    def patient(name: str, _: int, seen: list[int] = [0]) -> None:  # noqa: B006 - of this test
        for _ in range(20 if name == "step" and max(parts.rows, default=0) < 3 else 0):
            if looked[0] > seen[0]:  # the caller, since the step before
                break
            time.sleep(0.005)
        seen[0] = looked[0]

    monkeypatch.setattr(Call, "_may_ask", look)
    parts.before = patient
    with stand_in(parts, max_queued_requests=1) as pipe:
        pipe([str(number) for number in range(6)], plain(20))
    assert max(parts.rows) == 3
