"""A request exists before its images are loaded, can be stopped at any time, holds up nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import wait_until
from stand_in import HANG_S, Gate, Parts, SlowFile, answered, at_once, plain, png, stand_in
from vlmforge import Pipeline, Response
from vlmforge.api.calls import Call
from vlmforge.backends import DecoderBatch, FloatArray
from vlmforge.errors import CancelledError, ImageError, VlmforgeError
from vlmforge.outputs.events import Event

SLOTS = 3
Logits = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture
def parts() -> Parts:
    return Parts(SLOTS)


@pytest.fixture
def pipe(parts: Parts) -> Iterator[Pipeline]:
    with stand_in(parts) as made:
        yield made


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(png(1))
    return path


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, HANG_S)


async def reason(
    pipe: Pipeline, prompt: object, count: int, session: int = 0, **fields: Any
) -> str | None:
    last = None
    async for out in pipe.generate(prompt, session, plain(count, **fields)):
        last = out.finish_reason
    return last


def held(gate: Gate, token: int) -> dict[str, Any]:
    """Holds up the worker at this token of a request."""

    def processor(ids: list[int], logits: Logits) -> Logits:
        seen.append(len(ids))
        if len(seen) == token:
            gate.passed()
        return logits

    seen: list[int] = []
    return {"logits_processors": [processor]}


async def soon(task: asyncio.Task[Any]) -> Any:
    return await asyncio.wait_for(task, HANG_S)


def check_idle(pipe: Pipeline, parts: Parts) -> None:
    """Nothing runs beside a new request: each of its steps has one row."""
    seen = len(parts.rows)
    assert len(answered(lambda: whole(pipe("probe", plain(20)))).token_ids) == 20
    assert set(parts.rows[seen + 1 :]) == {1}


def whole(response: object) -> Response:
    assert isinstance(response, Response)
    return response


def test_cancelled_while_it_loads_nothing_is_run(
    pipe: Pipeline, parts: Parts, gate: Gate, picture: Path
) -> None:
    async def main() -> None:
        task = asyncio.create_task(reason(pipe, ("look", SlowFile(picture, gate)), 90))
        await reached(gate.reached)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(task)
        gate.open.set()

    asyncio.run(main())
    check_idle(pipe, parts)
    assert parts.calls["encode"] == 0
    assert parts.calls["step"] == 20


def test_stopped_while_it_loads_it_ends_at_once(
    pipe: Pipeline, parts: Parts, gate: Gate, picture: Path
) -> None:
    async def main() -> None:
        task = asyncio.create_task(reason(pipe, ("look", SlowFile(picture, gate)), 90, session=6))
        await reached(gate.reached)
        await pipe.stop_session(5)
        assert not task.done()
        await pipe.stop_session(6)
        assert await soon(task) == "abort"  # the gate is shut still

    asyncio.run(main())
    gate.open.set()
    check_idle(pipe, parts)


def test_stop_session_stops_every_request_of_it(pipe: Pipeline, parts: Parts, gate: Gate) -> None:
    """The one that runs ends with what it has, those that wait have nothing and end at once."""

    async def main() -> None:
        running = asyncio.create_task(reason(pipe, "long", 120, **held(gate, 5)))
        await reached(gate.reached)
        waiting = [asyncio.create_task(reason(pipe, f"prompt {n}", 120)) for n in range(5)]
        other = asyncio.create_task(reason(pipe, "another", 3, session=1))
        await asyncio.sleep(0)
        await pipe.stop_session(0)
        assert {await soon(task) for task in waiting} == {"abort"}
        gate.open.set()
        assert [await soon(running), await soon(other)] == ["abort", "length"]

    asyncio.run(main())
    check_idle(pipe, parts)


def test_a_request_that_ends_leaves_the_others_of_its_session(
    pipe: Pipeline, parts: Parts, gate: Gate
) -> None:
    async def main() -> str | None:
        first = Gate()
        short = asyncio.create_task(reason(pipe, "short", 2, **held(first, 2)))
        await reached(first.reached)
        long = asyncio.create_task(reason(pipe, "long", 120, **held(gate, 20)))
        await asyncio.sleep(0)  # it is known by now
        first.open.set()
        assert await soon(short) == "length"
        await reached(gate.reached)
        await pipe.end_session(0)
        gate.open.set()
        return await soon(long)  # type: ignore[no-any-return]

    assert asyncio.run(main()) == "abort"
    check_idle(pipe, parts)


@pytest.mark.parametrize("turns", range(12))
def test_cancelled_at_any_turn_of_the_loop_nothing_goes_on(
    pipe: Pipeline, parts: Parts, gate: Gate, turns: int
) -> None:
    async def main() -> None:
        prompt = ("look", png(1))  # whose answer cannot be whole before it is cancelled
        task = asyncio.create_task(reason(pipe, prompt, 120, **held(gate, 20)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(task)

    asyncio.run(main())
    gate.open.set()
    check_idle(pipe, parts)


def test_leaving_the_loop_cancels(pipe: Pipeline, parts: Parts) -> None:
    async def main() -> None:
        stream = pipe.generate("long", 0, plain(140))
        await anext(aiter(stream))
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())
    check_idle(pipe, parts)


@pytest.mark.parametrize("how", ["stream_infer", "chat"])
def test_a_stream_has_pieces_while_its_answer_goes_on(
    pipe: Pipeline, parts: Parts, gate: Gate, how: str
) -> None:
    parts.before = lambda name, number: gate.passed() if (name, number) == ("step", 9) else None
    more = {"stream_response": True} if how == "chat" else {}
    stream: Any = getattr(pipe, how)("long", gen_config=plain(140), **more)
    assert answered(lambda: next(stream)).finish_reason is None
    gate.open.set()
    assert answered(lambda: list(stream))[-1].finish_reason == "length"


def test_who_waits_for_whole_answers_is_woken_once_for_each(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken, wait = [], Call._next

    def noted(call: Call) -> list[Event]:
        woken.append(events := wait(call))
        return events

    monkeypatch.setattr(Call, "_next", noted)
    answers = answered(lambda: pipe(["a", "b", "c"], plain(20)))
    assert [answer.finish_reason for answer in answers] == ["length"] * 3
    assert [[event.last for event in events].count(True) for events in woken] == [1, 1, 1]
    woken.clear()
    answered(lambda: pipe.chat("a", gen_config=plain(20)))
    assert len(woken) == 1


def test_an_exception_beside_a_stream_cancels_it(pipe: Pipeline, parts: Parts) -> None:
    """Also while somebody holds the traceback, and with it the frames."""

    def showing(*_: object) -> None:
        raise BrokenPipeError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tqdm.tqdm.update", showing)
        with pytest.raises(BrokenPipeError) as caught:
            pipe(["short", "long"], [plain(1), plain(140)], use_tqdm=True)
    check_idle(pipe, parts)
    assert caught.value is not None


def test_close_releases_whoever_waits_wherever_it_is(
    parts: Parts, gate: Gate, picture: Path
) -> None:
    pipe = stand_in(parts)
    with ThreadPoolExecutor(24) as pool:
        slow = [pool.submit(pipe, ("look", SlowFile(picture, gate)), plain(5)) for _ in range(20)]
        assert gate.reached.wait(HANG_S)
        running = pool.submit(pipe, "running", plain(140))
        wait_until(lambda: bool(parts.rows))
        answered(pipe.close)
        assert whole(running.result(HANG_S)).finish_reason in ("abort", "length")
        for call in slow:  # the gate is shut still
            with pytest.raises(CancelledError, match="closed"):
                call.result(HANG_S)
        gate.open.set()
    with pytest.raises(CancelledError, match="closed"):
        pipe("later")


def test_slow_images_do_not_hold_up_text(pipe: Pipeline, gate: Gate, picture: Path) -> None:
    with ThreadPoolExecutor(40) as pool:
        slow = [pool.submit(pipe, ("look", SlowFile(picture, gate)), plain(2)) for _ in range(40)]
        assert gate.reached.wait(HANG_S)
        assert answered(lambda: whole(pipe("text", plain(3)))).generate_token_len == 3
        assert not any(call.done() for call in slow)
        gate.open.set()
        assert {whole(call.result(HANG_S)).finish_reason for call in slow} == {"length"}


def test_what_waits_is_not_loaded(
    pipe: Pipeline, parts: Parts, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of requests may wait; few of them have their pixels in memory."""
    import vlmforge.runner.stages

    prepared: list[object] = []
    preprocess = vlmforge.runner.stages.preprocess

    def counted(*given: Any) -> Any:
        prepared.append(None)
        return preprocess(*given)

    monkeypatch.setattr("vlmforge.runner.stages.preprocess", counted)
    parts.before = lambda name, number: gate.passed() if (name, number) == ("step", 1) else None
    prompts = [(f"look {n}", png(n)) for n in range(60)]

    async def main() -> list[str | None]:
        tasks = [asyncio.create_task(reason(pipe, prompt, 2)) for prompt in prompts]
        await reached(gate.reached)
        await asyncio.to_thread(wait_until, lambda: len(prepared) >= 2 * SLOTS + 1)
        for _ in range(50):
            await asyncio.sleep(0.001)  # only a late failure, if it is too short
        assert len(prepared) <= 2 * SLOTS + 1  # those ahead, and the one that runs
        gate.open.set()
        return [await soon(task) for task in tasks]

    assert asyncio.run(main()) == ["length"] * len(prompts)
    assert len(prepared) == len(prompts)


def test_waiting_requests_can_be_stopped(pipe: Pipeline, parts: Parts, gate: Gate) -> None:
    """Those that nothing was done for yet, and those that wait for a slot, end at once."""
    parts.before = lambda name, number: gate.passed() if (name, number) == ("step", 1) else None

    async def main() -> None:
        first = asyncio.create_task(reason(pipe, "first", 4, session=1))
        await reached(gate.reached)
        tasks = [
            asyncio.create_task(reason(pipe, (f"look {n}", png(n)) if n % 2 else f"{n}", 4, 2))
            for n in range(30)
        ]
        await asyncio.sleep(0)
        await pipe.stop_session(2)
        found = await asyncio.wait_for(asyncio.gather(*tasks), HANG_S)
        assert set(found) == {"abort"}
        gate.open.set()
        assert await soon(first) == "length"

    asyncio.run(main())
    check_idle(pipe, parts)


def test_an_error_of_one_leaves_those_that_wait(
    pipe: Pipeline, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that breaks concerns the rows that it ran, not the queue."""
    broken, run = list[int](), parts.step

    def fail(batch: DecoderBatch) -> FloatArray:
        if len(batch.slots) == SLOTS and not broken:
            broken.append(1)
            raise MemoryError
        return run(batch)

    monkeypatch.setattr(parts, "step", fail)
    answers = answered(lambda: at_once(pipe, [f"prompt {n}" for n in range(12)], plain(30)))
    ends = [answer.finish_reason for answer in answers]
    assert broken
    assert ends.count("error") == SLOTS
    assert ends.count("length") == 12 - SLOTS


def test_errors_of_preparation_are_the_callers(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        answered(lambda: pipe(("look", "no/such/file.png")))

    def broken(*_: object) -> np.ndarray[Any, Any]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("vlmforge.runner.stages.preprocess", broken)
    with pytest.raises(VlmforgeError, match="not one of vlmforge's") as caught:
        answered(lambda: pipe(("look", png(3))))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    responses = answered(lambda: pipe([("look", png(3)), "text"], gen_config=plain(2)))
    assert isinstance(responses, list)
    assert [r.finish_reason for r in responses] == ["error", "length"]


def test_many_callers_get_their_own(pipe: Pipeline) -> None:
    prompts: list[Any] = [("look", png(n % 4)) if n % 3 else f"text {n % 5}" for n in range(40)]
    expected = {repr(p): answered(lambda p=p: whole(pipe(p, plain(6)))).token_ids for p in prompts}
    with ThreadPoolExecutor(8) as pool:
        calls: list[Future[Any]] = [pool.submit(pipe, p, plain(6)) for p in prompts]
        assert not wait(calls, HANG_S).not_done
    for prompt, call in zip(prompts, calls, strict=True):
        assert call.result().token_ids == expected[repr(prompt)]
