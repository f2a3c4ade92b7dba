"""A garbage collector and the handlers of signals run in the middle of anything."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import PIL.Image
import pytest

from stand_in import HANG_S, Gate, Parts, answered, plain, png, stand_in
from vlmforge import Pipeline, Response
from vlmforge.errors import CancelledError
from vlmforge.inputs.messages import Conversation, Image, Message
from vlmforge.outputs.events import Event
from vlmforge.runner.job import Job
from vlmforge.scheduler.intake import Lane, _serve_next
from vlmforge.scheduler.loop import Loop
from vlmforge.scheduler.request import Request

TESTS = Path(__file__).parents[1]


@pytest.fixture
def pipe() -> Iterator[Pipeline]:
    with stand_in(Parts(1), slots=1) as made:
        yield made


def drop_stream(pipe: Pipeline) -> None:
    """Leave a stream behind that only the garbage collector can end."""
    stream: Any = pipe.stream_infer("left", plain(140))
    next(stream)
    cycle = [stream]
    cycle.append(cycle)


def meanwhile(monkeypatch: pytest.MonkeyPatch, does: str, happens: Callable[[], object]) -> None:
    """`happens` in the thread of the next request's caller, while it does this of `Lane`."""
    method = getattr(Lane, does)

    def hooked(lane: Lane, *given: object) -> object:
        monkeypatch.setattr(Lane, does, method)
        happens()
        return method(lane, *given)

    monkeypatch.setattr(Lane, does, hooked)


# A text is prepared by the caller, a picture is handed over.
WHILE = pytest.mark.parametrize(
    ("does", "prompt"),
    [("put_here", "next"), ("serve_here", "next"), ("_provide_thread", ("next", png(1)))],
)


@WHILE
def test_a_stream_that_is_collected_while_another_is_queued(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, does: str, prompt: object
) -> None:
    gc.disable()
    try:
        drop_stream(pipe)
        meanwhile(monkeypatch, does, gc.collect)
        assert answered(lambda: pipe(prompt, plain(3)))
    finally:
        gc.enable()
    assert getattr(Lane, does).__name__ == does  # it happened


def test_a_request_that_is_cancelled_by_its_own_event() -> None:
    """The collector may find a stream in the moment in which its request is told of an error."""
    errors = list[object]()

    def sink(event: object) -> None:
        errors.append(event)
        if len(errors) == 1:
            request.fail(CancelledError("collected"))

    request = Request(conversation=None, config=plain(), sink=sink)  # type: ignore[arg-type]
    answered(lambda: request.fail(ValueError("first")))
    assert request.ended


@WHILE
def test_closed_while_a_request_is_queued(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, does: str, prompt: object
) -> None:
    """As the handler of a signal does it, which runs in the thread that it interrupts."""
    meanwhile(monkeypatch, does, pipe.close)
    with pytest.raises(CancelledError, match="closed"):
        answered(lambda: pipe(prompt))


def test_a_caller_who_is_interrupted_while_it_prepares(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does it: that is no error of the request, and its place is free again."""

    def interrupted(_: Request) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipe._intake._texts, "_prepare", interrupted)
        answered(lambda: pipe(["left", "behind"]))
    assert answered(lambda: pipe("next", plain(3)))
    assert pipe._intake.waiting == 0


@pytest.mark.parametrize(("whose", "does"), [(Lane, "put_here"), (Loop, "submit")])
def test_a_caller_who_is_interrupted_between_two_lines(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, whose: type, does: str
) -> None:
    """Its place is free again, once: before it is prepared, and after it was handed over."""
    method = getattr(whose, does)

    def interrupted(*given: object) -> NoReturn:
        method(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(whose, does, interrupted)
        answered(lambda: pipe("left"))
    assert answered(lambda: pipe("next", plain(3)))
    assert pipe._intake.waiting == 0
    assert not pipe._intake._texts._preparing


def test_a_request_that_was_handed_over_is_the_worker_s_to_end(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor may close the pipeline before the thread that handed it over goes on."""
    submit, lane = Loop.submit, pipe._intake._texts

    def closes(loop: Loop, job: Job) -> None:
        submit(loop, job)
        lane.close()

    monkeypatch.setattr(Loop, "submit", closes)
    answer = answered(lambda: pipe("whole", plain(3)))
    assert isinstance(answer, Response) and answer.finish_reason == "length"


def test_what_was_asked_about_goes_with_its_request() -> None:
    """No collector need come by: it would find the pictures of hundreds of requests."""
    picture = PIL.Image.new("L", (3, 3))
    gone = weakref.ref(picture)
    asked = Conversation((Message("user", (Image(picture),)),))
    request = Request(asked, plain(n=2), list[object]().append)
    answers = request.expect(2)
    gc.disable()
    try:
        for answer in answers:
            answer.send(None, ValueError("ended"))
        assert request.ended
        del picture, asked, request
        assert gone() is None
    finally:
        gc.enable()


def test_a_request_whose_pipeline_nobody_holds_any_more_ends(pipe: Pipeline) -> None:
    """A thread that finds it then has nothing to prepare it with."""
    events = list[Event]()
    lane = Lane(pipe._intake._texts._prepare, pipe._scheduler, threads=0, ahead=1)
    request = Request(conversation=None, config=plain(), sink=events.append)  # type: ignore[arg-type]
    gone, todo = weakref.ref(lane), lane._todo
    todo.put(request)
    del lane
    gc.collect()
    assert gone() is None
    assert _serve_next(gone, todo)
    assert [type(event.error) for event in events] == [CancelledError]


def test_a_loop_that_is_gone_has_its_requests_cancelled(pipe: Pipeline) -> None:
    gate, steps = Gate(), list[int]()

    def processor(ids: list[int], logits: Any) -> Any:
        steps.append(len(ids))
        if len(steps) == 20:
            gate.passed()
        return logits

    async def first() -> Any:
        stream = pipe.generate("long", gen_config=plain(140, logits_processors=[processor]))
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(first())
    loop.close()
    gate.open.set()
    pipe("the only slot is free again", plain(1))
    assert len(steps) <= 22
    del stream


def test_a_child_can_end_whatever_was_locked_when_it_was_forked() -> None:
    program = f"""
        import os, sys, threading
        sys.path.insert(0, {str(TESTS)!r})
        from stand_in import *

        pipe = stand_in(Parts(1), slots=1)
        pipe("hi", plain(1))
        held, forked = threading.Event(), threading.Event()

        def hold():
            with pipe._intake._texts._lock:
                held.set()
                forked.wait()

        threading.Thread(target=hold).start()
        held.wait()
        if (child := os.fork()) == 0:
            sys.exit(7)
        forked.set()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * HANG_S,
    )
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr
