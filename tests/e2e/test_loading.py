"""An engine's parts are loaded, both at once: by whom, and what becomes of errors."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import HANGS
from vlmforge import EngineConfig, GenerationConfig, pipeline
from vlmforge.api import memory
from vlmforge.backends import onnxruntime
from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.manifest import Part, load_manifest
from vlmforge.engine.positions import PositionPolicy
from vlmforge.errors import EngineError

_OURS = "vlmforge-load"
Before = Callable[[str], None]


def loading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == _OURS]


def ask(engine: Path) -> str:
    with pipeline(engine, backend_config=EngineConfig(threads=1)) as pipe:
        return pipe("hello", gen_config=GenerationConfig(max_new_tokens=2, ignore_eos=True)).text


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Callable[[Before], None]:
    """Have something done, with a part's name, before it is loaded."""
    load: Any = onnxruntime._session

    def set_up(work: Before) -> None:
        def loaded(path: Path, part: Part, *rest: Any) -> Any:
            work(part.name)
            return load(path, part, *rest)

        monkeypatch.setattr(onnxruntime, "_session", loaded)

    return set_up


def test_where_memory_is_plenty_both_are_loaded_at_once(
    hf_engine: Path, before: Callable[[Before], None]
) -> None:
    there = threading.Barrier(2)

    def meet(_: str) -> None:
        there.wait(HANGS)

    before(meet)
    assert ask(hf_engine) is not None
    assert not loading()


def test_where_memory_is_short_no_thread_is_begun(
    hf_engine: Path, before: Callable[[Before], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_PACK_SHARE", 0)
    seen = list[tuple[str, int]]()
    before(lambda part: seen.append((part, len(loading()))))
    assert ask(hf_engine) is not None
    assert seen == [("vision", 0), ("decoder", 0)]


@pytest.mark.parametrize("broken", [("vision",), ("decoder",), ("vision", "decoder")])
def test_the_error_is_that_of_the_first_part_that_is_broken(
    hf_engine: Path, before: Callable[[Before], None], broken: tuple[str, ...]
) -> None:
    def fail(part: str) -> None:
        if part == "decoder":
            time.sleep(0.05)
        if part in broken:
            raise EngineError(f"cannot load {part}.")

    before(fail)
    with pytest.raises(EngineError, match=f"cannot load {broken[0]}"):
        ask(hf_engine)
    assert not loading()


@pytest.mark.parametrize("during", ["vision", "decoder"])
def test_an_interrupt_does_not_wait_for_the_part_that_is_loaded_beside(
    hf_engine: Path, before: Callable[[Before], None], during: str
) -> None:
    """Whether it comes while the vision part is loaded, or the decoder is waited for."""
    left, main = threading.Event(), threading.main_thread().ident
    assert main is not None and main == threading.get_ident()

    def interrupt(part: str) -> None:
        if part == during:
            time.sleep(0.3)
            signal.pthread_kill(main, signal.SIGINT)
        if part == "decoder":
            assert left.wait(HANGS)

    before(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ask(hf_engine)
    (thread,) = loading()
    left.set()
    thread.join(HANGS)
    assert not thread.is_alive()


def test_without_one_more_thread_they_are_loaded_one_after_the_other(
    hf_engine: Path, before: Callable[[Before], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        if thread.name == _OURS:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    seen = list[str]()
    before(seen.append)
    assert ask(hf_engine) is not None
    assert seen == ["vision", "decoder"]


LATE = """
import sys, threading
from vlmforge import pipeline
def serve():
    threading.main_thread().join()
    with pipeline(sys.argv[1]) as pipe:
        print(type(pipe("hello")).__name__)
threading.Thread(target=serve).start()
"""


def test_an_engine_can_be_loaded_when_the_main_thread_has_ended(hf_engine: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE, hf_engine], capture_output=True, text=True, timeout=HANGS
    )
    assert (done.stdout.strip(), done.returncode) == ("Response", 0), done.stderr


def test_only_the_decoder_s_threads_look_long_for_work(
    hf_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the vision part would share the processors of the steps behind it.

    And those of the decoder, if they looked for less, would sleep where our own thread wakes up.
    """
    load, looked = onnxruntime.ort.InferenceSession, dict[str, int]()

    def loaded(path: Path, settings: Any, **named: Any) -> object:
        found = settings.get_session_config_entry("session.intra_op.spin_duration_us")
        looked[Path(path).name.partition(".")[0]] = int(found)
        return load(path, settings, **named)

    monkeypatch.setattr(onnxruntime.ort, "InferenceSession", loaded)
    assert ask(hf_engine) is not None
    assert looked["vision"] <= 500
    assert looked["decoder"] >= 40_000


MODULES = """
import sys
from vlmforge import pipeline
with pipeline(sys.argv[1]) as pipe:
    pipe("hello")
print(*sys.modules)
"""


def test_who_serves_an_engine_imports_the_policies_that_it_has(hf_engine: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MODULES, hf_engine], capture_output=True, text=True, check=True
    )
    manifest = load_manifest(hf_engine)
    places = [*ImagePolicy.__metadata__, *PositionPolicy.__metadata__]  # type: ignore[union-attr]
    there = {place.tag for place in places if place.module in done.stdout.split()}
    shared = {"absolute"}  # its arithmetic is that of other places too
    assert there - shared == {manifest.image.name, manifest.decode.positions.name} - shared
