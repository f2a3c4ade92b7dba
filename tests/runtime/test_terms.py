"""Who is served when: the queue's limit, priorities, salts and timeouts, of all call forms."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from conftest import wait_until
from stand_in import HANG_S, Gate, Parts, SlowFile, answered, plain, png, settle, stand_in
from vlmforge import Pipeline, QueueFullError, RequestTimeoutError, Response, Session
from vlmforge.errors import ConfigError, VlmforgeError
from vlmforge.outputs.events import GenOut
from vlmforge.runner.job import Job
from vlmforge.runner.terms import Terms

T = TypeVar("T")
SHORT = 0.05
"""Seconds after which a request that cannot end has had its time."""
PROMPT = ("look at this", png(1))


def whole(response: object) -> Response:
    assert isinstance(response, Response)
    return response


def held(gate: Gate, token: int = 1) -> dict[str, Any]:
    """Holds up the worker at this token of a request."""

    def processor(ids: list[int], logits: Any) -> Any:
        seen.append(len(ids))
        if len(seen) == token:
            gate.passed()
        return logits

    seen: list[int] = []
    return {"logits_processors": [processor]}


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


def check_idle(pipe: Pipeline, parts: Parts) -> None:
    """Nothing runs beside a new request, and nobody holds memory."""
    assert len(whole(answered(lambda: pipe("probe", plain(3)))).token_ids) == 3
    seen = len(parts.rows)
    assert len(whole(answered(lambda: pipe("probe", plain(20)))).token_ids) == 20
    assert set(parts.rows[seen:]) == {1}
    wait_until(lambda: pipe._intake.waiting == 0)  # its threads end what was held


# --- the queue -----------------------------------------------------------------------------------


@asynccontextmanager
async def busy(pipe: Pipeline, gate: Gate) -> AsyncIterator[asyncio.Task[Any]]:
    """The only slot is taken, as long as the gate is shut."""
    task = asyncio.create_task(collected(pipe, "first", plain(2, **held(gate))))
    await asyncio.to_thread(gate.reached.wait, HANG_S)
    yield task
    gate.open.set()
    await task


async def collected(pipe: Pipeline, prompt: object, config: Any, **more: Any) -> list[GenOut]:
    return [out async for out in pipe.generate(prompt, gen_config=config, **more)]


async def until(holds: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, holds)


@pytest.mark.parametrize("prompt", ["text", PROMPT], ids=["text", "image"])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_as_many_wait_as_may(gate: Gate, most: int, prompt: object) -> None:
    """However far they have been prepared."""

    async def main() -> None:
        async with busy(pipe, gate):
            more = [asyncio.create_task(collected(pipe, prompt, plain(2))) for _ in range(most)]
            await until(lambda: pipe._intake.waiting == most)
            for _ in range(2):
                with pytest.raises(QueueFullError, match="as many requests waiting") as caught:
                    await collected(pipe, prompt, plain(2))
            assert caught.value.found == f"{most} requests that wait"
            assert caught.value.expected == f"at most {most}"
            assert caught.value.code == "queue_full"
            more[0].cancel()
        await until(lambda: not pipe._intake.full)  # at the latest when the worker looks
        for task in more[1:]:
            assert (await task)[-1].finish_reason == "length"
        assert (await collected(pipe, prompt, plain(2)))[-1].finish_reason == "length"

    with stand_in(slots=1, max_queued_requests=most) as pipe:
        asyncio.run(main())
        wait_until(lambda: pipe._intake.waiting == 0)  # the cancelled one may be prepared still


def test_a_call_that_blocks_waits_instead(gate: Gate) -> None:
    with stand_in(slots=1, max_queued_requests=1) as pipe, ThreadPoolExecutor(9) as pool:
        calls: list[Future[Any]] = [pool.submit(pipe, "first", plain(2, **held(gate)))]
        assert gate.reached.wait(HANG_S)
        calls += [pool.submit(pipe, ["a", PROMPT] * 8, plain(2)) for _ in range(3)]
        calls += [pool.submit(lambda: list(pipe.stream_infer(["b"] * 5, plain(2))))]
        calls += [pool.submit(pipe.chat, "c", gen_config=plain(2)) for _ in range(3)]
        wait_until(lambda: pipe._intake.waiting >= 7)
        assert pipe._intake.waiting == 7  # one for each thread that waits
        gate.open.set()
        found = [call.result(HANG_S) for call in calls]
    assert all(r.finish_reason == "length" for batch in found[1:4] for r in batch)
    assert isinstance(found[5], Session)


# --- priorities ----------------------------------------------------------------------------------


def test_higher_priorities_first(gate: Gate) -> None:
    """Also when many of a lower one have been prepared, and in the order in which they came."""
    ended: list[str] = []

    def last(_: list[int], logits: Any) -> Any:
        wait_until(lambda: "6" in handed)  # it got its place when "0" began
        return logits

    async def ask(name: str, prompt: object, priority: int) -> None:
        more = {"logits_processors": [last]} if name == "3" else {}
        await collected(pipe, prompt, plain(3, **more), priority=priority)
        ended.append(name)

    async def main() -> None:
        async with busy(pipe, gate):
            tasks = []
            for number, priority in enumerate((0, 0, 0, 0, -1, 1, 0, 2, 1, 2)):
                prompt = (f"{number}", png(1)) if number % 2 else f"{number}"
                tasks.append(asyncio.create_task(ask(f"{number}", prompt, priority)))
                await until(lambda number=number: pipe._intake.waiting == number + 1)  # type: ignore[misc]
                # The highest are prepared, however many came before; of the others, two texts.
                if number not in (4, 6):
                    await until(lambda number=number: f"{number}" in handed)  # type: ignore[misc]
            assert not {"4", "6"} & {*handed}
        await asyncio.gather(*tasks)

    handed: list[str] = []
    with stand_in(slots=1) as pipe:
        submit, texts = pipe._scheduler.submit, dict[int, str]()
        for lane in (pipe._intake._texts, pipe._intake._images):

            def noted(request: Any, prepare: Any = lane._prepare) -> Any:
                job = prepare(request)
                texts[id(job)] = request.conversation.messages[0].texts[0]
                return job

            lane._prepare = noted

        def submitted(job: Job) -> None:
            submit(job)
            handed.append(texts.pop(id(job)))

        pipe._scheduler.submit = submitted  # type: ignore[method-assign]
        asyncio.run(main())
    assert len(ended) == 10
    assert sorted(ended[:2]) == ["7", "9"]
    assert sorted(ended[2:4]) == ["5", "8"]
    assert ended[-1] == "4"


def test_a_higher_one_takes_the_place_of_a_lower_one(gate: Gate) -> None:
    with stand_in(slots=1) as pipe, ThreadPoolExecutor(2) as pool:
        expected = whole(pipe("first", plain(30))).text
        low = pool.submit(pipe, "first", plain(30, **held(gate, 5)))
        assert gate.reached.wait(HANG_S)
        high = pool.submit(pipe, "second", plain(3), priority=1)
        wait_until(lambda: pipe._intake.waiting == 1)
        assert not low.done()
        gate.open.set()
        assert whole(high.result(HANG_S)).finish_reason == "length"
        assert whole(low.result(HANG_S)).text == expected


# --- salts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("salts", [("", "a"), ("a", "b"), ("a", ""), ("", "0"), ("0", "00")])
def test_another_salt_has_nothing_in_common(salts: tuple[str, str]) -> None:
    parts, (ours, theirs) = Parts(3), salts
    with stand_in(parts, slots=3) as pipe:
        first = whole(pipe(PROMPT, plain(5), salt=ours))
        again = whole(pipe(PROMPT, plain(5), salt=ours))
        assert again.cached_tokens == first.input_token_len - 1
        assert parts.calls["encode"] == 1
        other = whole(pipe(PROMPT, plain(5), salt=theirs))
        assert other.timings is not None
        assert other.cached_tokens == other.timings.cached_images == 0
        assert parts.calls["encode"] == 2
        assert first.text == again.text == other.text
        assert whole(pipe(PROMPT, plain(5), salt=theirs)).cached_tokens == again.cached_tokens


def test_nor_with_an_image_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether somebody has shown the image before cannot be told by how long it takes."""
    parts = Parts(1)
    with stand_in(parts, slots=1) as pipe:
        for salt, encoded in (("a", 1), ("a", 1), ("b", 2), ("", 3), ("b", 3)):
            whole(pipe((f"asked of {salt}", png(5)), plain(2), salt=salt))
            assert parts.calls["encode"] == encoded


def test_a_conversation_in_its_salt() -> None:
    with stand_in(slots=2) as pipe:
        session = pipe.chat(PROMPT, gen_config=plain(4), salt="mine")
        for salt, hits in (("mine", True), ("theirs", False)):
            pipe.chat("and", session, plain(4), salt=salt)  # type: ignore[arg-type]
            assert isinstance(session, Session)
            assert session.response is not None
            assert (session.response.cached_tokens > 0) is hits


# --- timeouts ------------------------------------------------------------------------------------


def test_the_error_is_a_timeout_and_ours() -> None:
    error = Terms(0, b"", 2.5).timed_out()
    assert isinstance(error, TimeoutError)
    assert isinstance(error, VlmforgeError)
    assert str(error).startswith("The request was not finished in time.\n  found:    no end")
    assert "2.5 s" in error.found
    assert error.code == "request_timeout"
    assert str(pickle.loads(pickle.dumps(error))).startswith("The request was not finished in time")


def test_time_runs_out_while_it_waits_for_a_place(gate: Gate) -> None:
    parts = Parts(1)
    with stand_in(parts, slots=1) as pipe, ThreadPoolExecutor(1) as pool:
        running = pool.submit(pipe, "first", plain(2, **held(gate)))
        assert gate.reached.wait(HANG_S)
        steps = parts.calls["step"]
        with pytest.raises(RequestTimeoutError, match="in time"):
            answered(lambda: pipe(PROMPT, plain(2), timeout=SHORT))
        with pytest.raises(RequestTimeoutError):
            answered(lambda: list(pipe.stream_infer(PROMPT, plain(2), timeout=SHORT)))
        with pytest.raises(RequestTimeoutError):
            answered(lambda: asyncio.run(collected(pipe, PROMPT, plain(2), timeout=SHORT)))
        session = pipe.session()
        with pytest.raises(RequestTimeoutError):
            answered(lambda: pipe.chat("hi", session, plain(2), timeout=SHORT))
        assert session.history == []
        assert (steps, parts.calls["encode"]) == (parts.calls["step"], 0)
        gate.open.set()
        assert whole(running.result(HANG_S)).finish_reason == "length"
        check_idle(pipe, parts)


def test_time_runs_out_while_an_image_is_loaded(gate: Gate, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png(1))
    parts = Parts(1)
    with stand_in(parts, slots=1) as pipe:
        with pytest.raises(RequestTimeoutError):
            answered(lambda: pipe(("look", SlowFile(path, gate)), plain(2), timeout=SHORT))
        with pytest.raises(RequestTimeoutError):
            slow = ("look", SlowFile(path, gate))
            answered(lambda: asyncio.run(collected(pipe, slow, plain(2), timeout=SHORT)))
        gate.open.set()
        check_idle(pipe, parts)
        assert parts.calls["encode"] == 0


def long_enough(call: Callable[[float, Gate], T]) -> tuple[T, Gate]:
    """What `call(timeout, gate)` gives, of a timeout that ends when the gate has been reached."""
    for seconds in (0.3, 3, 30, 300):
        gate = Gate()
        found = call(seconds, gate)
        if gate.reached.is_set():
            return found, gate
        gate.open.set()
    raise AssertionError("the gate was never reached")


@pytest.mark.parametrize("n", [1, 2])
def test_time_runs_out_within_an_answer(n: int) -> None:
    """Its work stops with the step that runs, and its pieces were handed out."""
    parts = Parts(3)
    with stand_in(parts, slots=3) as pipe:

        def stream(seconds: float, gate: Gate) -> tuple[list[Response], Exception | None]:
            config, pieces = plain(100, n=n, **held(gate, 30)), list[Response]()
            try:
                pieces.extend(pipe.stream_infer("look", config, timeout=seconds))
            except RequestTimeoutError as error:
                return pieces, error
            return pieces, None

        (pieces, error), gate = answered(lambda: long_enough(stream))
        assert isinstance(error, RequestTimeoutError)
        assert {piece.choice for piece in pieces} == {*range(n)}
        steps = parts.calls["step"]
        gate.open.set()
        check_idle(pipe, parts)
        assert parts.calls["step"] - steps <= 1 + 3 + 20
        settle(pipe)
        assert pipe._scheduler._jobs._cache.held_blocks == 0


def test_a_slow_reader_does_not_keep_the_worker_busy() -> None:
    parts = Parts(1)
    with stand_in(parts, slots=1) as pipe:

        def begun(seconds: float, gate: Gate) -> Iterator[Response]:
            pieces = pipe.stream_infer("look", plain(140, **held(gate, 30)), timeout=seconds)
            with suppress(RequestTimeoutError):
                next(pieces)
                time.sleep(seconds)
            return pieces

        pieces, gate = long_enough(begun)
        steps = parts.calls["step"]
        gate.open.set()
        check_idle(pipe, parts)
        assert parts.calls["step"] - steps <= 1 + 3 + 20
        with pytest.raises(RequestTimeoutError):
            list(pieces)


def test_of_a_list_what_there_is_stays() -> None:
    with stand_in(slots=3) as pipe:

        def call(seconds: float, gate: Gate) -> object:
            configs = [plain(2), plain(60, **held(gate, 40)), plain(2)]
            return pipe(["a", "b", "c"], configs, timeout=seconds)

        found, gate = answered(lambda: long_enough(call))
        assert isinstance(found, list)
        gate.open.set()
        assert found[1].error_code == "request_timeout"
        assert len(found[1].token_ids) > 30  # what came before
        ends = [(r.finish_reason, r.error_code) for r in found[::2]]  # they may have come late
        assert {*ends} <= {("length", None), ("error", "request_timeout")}
        late = answered(lambda: pipe(["d"] * 50, plain(2), timeout=SHORT / 1e6))
        assert {r.error_code for r in late} == {"request_timeout"}  # type: ignore[union-attr]


def test_time_that_is_not_needed() -> None:
    with stand_in(slots=2) as pipe:
        for seconds in (HANG_S, 1e300, None, threading.TIMEOUT_MAX):
            assert whole(pipe("a", plain(3), timeout=seconds)).finish_reason == "length"
            found = asyncio.run(collected(pipe, "a", plain(3), timeout=seconds))
            assert found[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("timeout", 0, "a number > 0 or None"),
        ("timeout", -1.0, "a number > 0 or None"),
        ("timeout", float("nan"), "a number > 0 or None"),
        ("priority", 1.5, "an integer in [-2147483648, 2147483647]"),
        ("priority", None, "an integer in [-2147483648, 2147483647]"),
        ("salt", b"bytes", "a string"),
        ("salt", None, "a string"),
    ],
)
def test_what_terms_may_not_be(name: str, value: Any, expected: str) -> None:
    with stand_in(slots=1) as pipe:
        for call in (
            lambda: pipe("a", **{name: value}),
            lambda: list(pipe.stream_infer("a", **{name: value})),
            lambda: pipe.chat("a", **{name: value}),
            lambda: asyncio.run(collected(pipe, "a", plain(1), **{name: value})),
        ):
            with pytest.raises(ConfigError, match=f"{name} must be") as caught:
                call()
            assert caught.value.expected == expected
