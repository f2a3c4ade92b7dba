"""What becomes of a pipeline when its process forks or ends, and when nobody holds it any more."""

from __future__ import annotations

import queue
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from conftest import wait_until
from stand_in import HANG_S, Gate, Parts, answered, plain, png, stand_in
from vlmforge import Pipeline, lifetime
from vlmforge.errors import CancelledError
from vlmforge.scheduler.request import Request

TESTS = Path(__file__).parents[1]


def program(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program that has the stand-in at hand; a failure if it never ends."""
    begin = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", begin + textwrap.dedent(text), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * HANG_S,
    )


FORKED = """
    import asyncio, os, threading
    from stand_in import *

    parts = Parts(1)
    pipe = stand_in(parts, slots=1)
    stream = pipe.stream_infer("begun before the fork", plain(140))
    next(stream)
    gate = Gate()
    if "busy" in sys.argv:  # the worker is in the middle of a step, others wait for it
        parts.before = lambda name, number: gate.passed()
        waiting = threading.Thread(target=pipe, args=("waits", plain(2)), daemon=True)
        waiting.start()
        assert gate.reached.wait(HANG_S)

    async def first():
        return await anext(aiter(pipe.generate("hi")))

    if (child := os.fork()) == 0:
        calls = {
            "call": lambda: pipe("hi"),
            "list": lambda: pipe(["hi", ("look", png(1))]),
            "stream": lambda: list(pipe.stream_infer("hi")),
            "begun": lambda: next(stream),
            "chat": lambda: pipe.chat(("look", png(1))),
            "generate": lambda: asyncio.run(first()),
            "stop": lambda: asyncio.run(pipe.stop_session(0)),
            "count": lambda: pipe.count_tokens("hi"),
            "close": pipe.close,
        }
        for name, call in calls.items():
            try:
                print(name, "fine", call() is not None)
            except Exception as error:
                print(name, type(error).__name__, "after the fork" in error.fix)
        with stand_in(Parts(1), slots=1) as own:
            print("own", own("hi", plain(4)).generate_token_len)
        del pipe, stream
        sys.exit(7)  # by the long way: everything is taken down
    _, status = os.waitpid(child, 0)
    gate.open.set()
    print("child", os.waitstatus_to_exitcode(status))
    print("parent", sum(1 for _ in stream) > 0, pipe("hi", plain(3)).generate_token_len)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_a_forked_child_is_told_and_nothing_waits(state: str) -> None:
    done = program(FORKED, state)
    assert done.returncode == 0, done.stderr
    refused = ("call", "list", "stream", "begun", "chat", "generate")
    assert done.stdout.splitlines() == [
        *(f"{name} PipelineError True" for name in refused),
        "stop fine False",
        "count fine True",
        "close fine False",
        "own 4",
        "child 7",
        "parent True 3",
    ]


def test_a_child_does_not_wait_where_it_frees_an_engine(hf_engine: Path) -> None:
    """ONNX Runtime waits for its threads where a session is freed; the child has none of them."""
    done = program(
        """
        import os, time
        from vlmforge import EngineConfig, pipeline

        pipe = pipeline(sys.argv[1], EngineConfig(threads=2, max_batch_size=1))
        pipe.close()
        time.sleep(0.5)  # the library's threads go to sleep: only then would it wait
        if (child := os.fork()) == 0:
            del pipe
            os._exit(7)  # as children of multiprocessing do
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        hf_engine,
    )
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr


ENDING = """
    import atexit, os, threading
    names = ("vlmforge", "vlmforge-prepare")
    # Registered first, so called last: just before the interpreter is taken down.
    atexit.register(lambda: print([t.name for t in threading.enumerate() if t.name in names]))
    from stand_in import *

    parts = Parts(2)
    pipe = stand_in(parts, slots=2)
    begun, gate = threading.Event(), Gate()

    def ask():
        for _ in pipe.stream_infer(["first", "second", "third"], plain(140)):
            begun.set()

    if sys.argv[1] == "generating":
        threading.Thread(target=ask, daemon=True).start()
        assert begun.wait(HANG_S)
    if sys.argv[1] == "loading":
        class Picture:
            def __fspath__(self):
                begun.set()
                return os.devnull
        threading.Thread(target=lambda: pipe(("look", Picture())), daemon=True).start()
        assert begun.wait(HANG_S)
    if sys.argv[1] == "lasting":  # a thread that the interpreter waits for may go on asking
        def late():
            threading.main_thread().join()
            print("late", pipe(("look", png(1)), plain(3)).generate_token_len)
        threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("state", ["idle", "generating", "loading", "lasting"])
def test_the_threads_have_ended_before_the_interpreter_goes(state: str) -> None:
    done = program(ENDING, state)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["late 3"] * (state == "lasting") + ["[]"]


def test_leaving_python_while_an_engine_runs_is_no_abort(hf_engine: Path) -> None:
    done = program(
        """
        import threading
        from vlmforge import EngineConfig, GenerationConfig, pipeline

        pipe = pipeline(sys.argv[1], EngineConfig(threads=2, max_batch_size=4))
        config, begun = GenerationConfig(max_new_tokens=None, ignore_eos=True), threading.Event()

        def ask():
            for _ in pipe.stream_infer(["hello"] * 4, config):
                begun.set()

        threading.Thread(target=ask, daemon=True).start()
        assert begun.wait(600)
        """,
        hf_engine,
    )
    assert done.returncode == 0, done.stderr


def of_pipelines() -> set[threading.Thread]:
    """Threads of pipelines; those that decode are the process's."""
    return {t for t in threading.enumerate() if t.name in ("vlmforge", "vlmforge-prepare")}


@pytest.fixture
def threads() -> set[threading.Thread]:
    return of_pipelines()


def ended(before: set[threading.Thread]) -> bool:
    """Whether every thread that began since then ends."""
    for thread in of_pipelines() - before:
        thread.join(HANG_S)
    return not of_pipelines() - before


def dropped(*, asked: bool) -> tuple[weakref.ref[Pipeline], weakref.ref[Parts]]:
    parts = Parts(2)
    pipe = stand_in(parts, slots=2)
    if asked:
        pipe(["text", ("look", png(1))], plain(3))  # type: ignore[arg-type]
        pipe.chat(("look", png(2)), gen_config=plain(2))
        next(pipe.stream_infer("left early", plain(90)))
    return weakref.ref(pipe), weakref.ref(parts)


@pytest.mark.parametrize("asked", [False, True])
def test_a_pipeline_that_nobody_holds_is_freed(threads: set[threading.Thread], asked: bool) -> None:
    """At once, without the help of the garbage collector, and its threads and engine with it."""
    pipe, parts = dropped(asked=asked)
    assert pipe() is None
    assert ended(threads)
    assert parts() is None


def test_one_that_is_dropped_in_its_own_callback_is_freed(threads: set[threading.Thread]) -> None:
    """The worker holds the last reference: nobody may wait for the worker there."""
    held = [stand_in(Parts(1), slots=1)]
    parts = weakref.ref(held[0])
    asked, gate = threading.Event(), Gate()

    def drops(_: list[int], logits: np.ndarray) -> np.ndarray:
        asked.set()
        gate.passed()
        held.clear()
        return logits

    async def leave() -> None:
        stream = held[0].generate("a", gen_config=plain(90, logits_processors=[drops]))
        import asyncio

        task = asyncio.ensure_future(anext(aiter(stream)))
        assert await asyncio.to_thread(asked.wait, HANG_S)
        task.cancel()
        await asyncio.wait([task])
        gate.open.set()

    import asyncio

    answered(lambda: asyncio.run(leave()))
    assert ended(threads)
    assert parts() is None


def test_a_closed_pipeline_frees_its_threads(threads: set[threading.Thread]) -> None:
    for _ in range(3):
        with stand_in(Parts(1), slots=1) as pipe:
            pipe([("look", png(1)), "text"], plain(2))  # type: ignore[arg-type]
    assert ended(threads)


def test_a_closed_pipeline_lets_its_engine_go_while_it_is_held() -> None:
    """Whoever closes one and still has it has its memory back."""
    pipe = stand_in(Parts(2), slots=2)
    pipe([("look", png(1)), "text"], plain(3))  # type: ignore[arg-type]
    engine = pipe._engine
    parts = [weakref.ref(engine.decoder), weakref.ref(engine.vision)]
    pipe.close()
    assert [part() for part in parts] == [None, None]
    assert pipe.metrics().requests["length"] == 2
    with pytest.raises(CancelledError, match="The pipeline is closed"):
        pipe("text")


class _LateEnds(queue.SimpleQueue[Request | None]):
    """Of a lane whose threads are told late that they are to end.

    Attributes:
        waiting: How often a thread has come to wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting, self.over = 0, False

    def get(self, block: bool = True, timeout: float | None = None) -> Request | None:
        self.waiting += 1
        return super().get(block, timeout)

    def put(self, item: Request | None, block: bool = True, timeout: float | None = None) -> None:
        if item is not None or self.over:
            super().put(item, block, timeout)

    def end(self) -> None:
        self.over = True
        self.put(None)


def test_what_is_closed_is_freed_before_its_threads_have_ended(
    threads: set[threading.Thread],
) -> None:
    parts, todo = Parts(1), _LateEnds()
    pipe, freed = stand_in(parts, slots=1), weakref.ref(parts)
    pipe._intake._images._todo = todo
    pipe(("look", png(1)), plain(2))
    wait_until(lambda: todo.waiting == 2)  # for the picture, and again
    features = pipe._scheduler._features
    assert features.bytes > 0
    pipe.close()
    left = features.bytes
    del pipe, parts, features
    held, alive = freed(), len(of_pipelines() - threads)
    todo.end()
    assert (left, held, alive) == (0, None, 1)
    assert ended(threads)


def test_the_end_waits_for_what_others_begin_at_it() -> None:
    """A library that leaves by a thread of its own, once its pipeline has been ended."""
    done = program(
        """
        import threading, time
        from vlmforge import lifetime

        class Late(lifetime.Owner):
            def __init__(self):
                self.thread = threading.Thread(target=self.leave, daemon=True)
                self.thread.start()
                lifetime.watch(self)

            def leave(self):
                time.sleep(0.2)
                print("left", flush=True)

            def end(self):
                self.thread.join(60)

        class Early(lifetime.Owner):
            def end(self):
                kept.append(Late())

        kept = [Early()]
        lifetime.watch(kept[0])
        """
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


class BusySet(weakref.WeakSet[lifetime.Owner]):
    """Another thread adds to it while it is looked through, once."""

    looked = 0

    def __iter__(self) -> Iterator[lifetime.Owner]:
        self.looked += 1
        found = super().__iter__()
        yield next(found)
        if self.looked == 1:
            raise RuntimeError("Set changed size during iteration")
        yield from found


def test_who_is_made_known_meanwhile_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Threads(lifetime.Owner):
        def abandon(self) -> None:
            told.append("gone")

    kept = [Threads(), Threads()]
    monkeypatch.setattr(lifetime, "_owners", BusySet(kept))
    monkeypatch.setattr(lifetime, "_process", structs.replace(lifetime._process))
    lifetime._forked()
    assert told == ["gone", "gone"]
