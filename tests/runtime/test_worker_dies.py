"""A worker that dies in the middle of its work: whoever waits, in whatever form, is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import wait_until
from stand_in import HANG_S, Gate, Parts, SlowFile, answered, plain, png, stand_in
from vlmforge import Pipeline
from vlmforge.backends import DecoderBatch, FloatArray
from vlmforge.errors import EngineStepError, PipelineError
from vlmforge.outputs.detokenizer import IncrementalDetokenizer
from vlmforge.outputs.sampling import Sampler
from vlmforge.runner.runner import Runner
from vlmforge.scheduler import jobs

LONG = plain(140)


async def _generated(pipe: Pipeline) -> None:
    async for _ in pipe.generate("a", gen_config=LONG):
        pass


CALLS: dict[str, Callable[[Pipeline], object]] = {
    "call": lambda pipe: pipe("a", LONG),
    "image": lambda pipe: pipe(("a", png(1)), LONG),
    "stream": lambda pipe: list(pipe.stream_infer("a", LONG)),
    "chat": lambda pipe: pipe.chat("a", gen_config=LONG),
    "chat_stream": lambda pipe: list(pipe.chat("a", gen_config=LONG, stream_response=True)),
    "generate": lambda pipe: asyncio.run(_generated(pipe)),
}


@pytest.mark.parametrize("where", ["step", "add"])
def test_everybody_who_waits_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Those whose answers are being generated, those that wait, and one that is still prepared."""
    parts, busy, slow = Parts(2), Gate(), Gate()
    (tmp_path / "late.png").write_bytes(png(2))

    def dies(*_: object) -> None:
        raise SystemError("a bug")

    with stand_in(parts, slots=2) as pipe, ThreadPoolExecutor(len(CALLS) + 2) as pool:
        parts.before = lambda name, number: busy.passed() if name == "step" else None
        late = pool.submit(pipe, ("a", SlowFile(tmp_path / "late.png", slow)), LONG)
        assert slow.reached.wait(HANG_S)
        waiting = {name: pool.submit(call, pipe) for name, call in CALLS.items()}
        assert busy.reached.wait(HANG_S)
        monkeypatch.setattr(jobs.Jobs, where, dies)
        if where == "add":
            waiting["one more"] = pool.submit(pipe, "b", LONG)
            wait_until(lambda: not pipe._scheduler._inbox.empty())
        busy.open.set()
        for name, future in waiting.items():
            error = future.exception(HANG_S)
            assert isinstance(error, PipelineError), name
            assert "SystemError: a bug" in error.found
        slow.open.set()
        assert isinstance(late.exception(HANG_S), PipelineError)
        with pytest.raises(PipelineError, match="died"):
            answered(lambda: pipe("later"))
        answered(pipe.close)


@pytest.mark.parametrize(
    ("owner", "name"), [(Sampler, "step"), (IncrementalDetokenizer, "push")], ids=str
)
def test_a_sampler_that_fails_ends_its_own_request(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    prompts, configs = ["a", "b", "c"], [plain(n) for n in (9, 12, 7)]
    with stand_in(slots=3) as pipe:
        alone = [
            answered(lambda p=p, c=c: pipe(p, c)) for p, c in zip(prompts, configs, strict=True)
        ]
        calls, run = [0], getattr(owner, name)

        def fails(*given: object) -> object:
            calls[0] += 1
            if calls[0] == 5:
                raise FloatingPointError("NaN")
            return run(*given)

        monkeypatch.setattr(owner, name, fails)
        found = answered(lambda: pipe(prompts, configs))
        assert isinstance(found, list)
        failed = [answer for answer in found if answer.finish_reason == "error"]
        assert [answer.error_code for answer in failed] == ["internal_error"]
        assert "FloatingPointError: NaN" in str(failed[0].error_message)
        for answer, expected in zip(found, alone, strict=True):
            assert answer in failed or answer.token_ids == expected.token_ids
        again = answered(lambda: pipe(prompts, configs))
        assert [a.token_ids for a in again] == [a.token_ids for a in alone]


def test_a_runner_that_raises_after_all_ends_those_of_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is to raise nothing; should it, nobody waits, and the next request is answered."""
    run, calls = Runner.run, [0]

    def fails(self: Runner, *given: object) -> object:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyError("a bug")
        return run(self, *given)  # type: ignore[arg-type]

    with stand_in(slots=2) as pipe:
        monkeypatch.setattr(Runner, "run", fails)
        (found,) = answered(lambda: pipe(["a"], plain(9)))
        assert found.error_code == "engine_step"
        assert answered(lambda: pipe("c", plain(4))).generate_token_len == 4


def test_a_failure_that_is_told_to_several_is_not_one_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each raises its own: tracebacks of different threads do not mix."""
    parts, handed = Parts(2), list[None]()
    step = parts.step

    def fails(batch: DecoderBatch) -> FloatArray:
        wait_until(lambda: len(handed) == 2)  # one may have come late
        if len(batch.slots) == 2:
            raise RuntimeError("once")
        return step(batch)

    with stand_in(parts, slots=2) as pipe, ThreadPoolExecutor(2) as pool:
        submit = pipe._scheduler.submit
        monkeypatch.setattr(pipe._scheduler, "submit", lambda job: handed.append(submit(job)))
        monkeypatch.setattr(parts, "step", fails)
        calls = [pool.submit(pipe, text, plain(90)) for text in ("a", "b")]
        first, second = (call.exception(HANG_S) for call in calls)
    assert isinstance(first, EngineStepError)
    assert isinstance(second, EngineStepError)
    assert first is not second
