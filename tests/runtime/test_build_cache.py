"""Engines that `pipeline(CHECKPOINT)` builds: where they are kept, who builds them, what fails."""

from __future__ import annotations

import io
import json
import os
import pwd
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from msgspec import structs

from conftest import wait_until
from sample_manifest import MANIFEST
from vlmforge import EngineConfig, env, pipeline
from vlmforge.api import load
from vlmforge.engine import build_cache, build_child
from vlmforge.engine.build_cache import engine_for
from vlmforge.engine.build_child import Outcome, run_build
from vlmforge.engine.manifest import ParallelLayout
from vlmforge.errors import BuildError, ConfigError

HANG_S = 600
ERROR = {
    "event": "error",
    "error": "CheckpointError",
    "summary": "There is no model.safetensors.",
    "found": "only config.json",
    "expected": "weights",
    "fix": "download it again",
}


def child(program: str) -> list[str]:
    """A stand-in for `build-engine`."""
    return [sys.executable, "-c", program]


# --- the child ---------------------------------------------------------------------------------


def test_its_words_are_passed_on_and_its_error_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        f"import sys\nprint('a library')\nprint({json.dumps(ERROR)!r})\n"
        "print('[0.0 s] read', file=sys.stderr)\n"
        "print(*sys.argv[1:], file=sys.stderr)\nsys.exit(1)"
    )
    outcome = run_build(child(program))
    assert outcome == Outcome(1, ERROR, ("[0.0 s] read", "--until-eof --json-events -"))
    assert capsys.readouterr().err == "[0.0 s] read\n--until-eof --json-events -\n"


def test_of_many_words_the_last_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    program = "import sys\nfor i in range(5000): print('x' * 90, i, file=sys.stderr)"
    outcome = run_build(child(program))
    assert (outcome.status, outcome.error) == (0, None)
    assert outcome.words[-1].endswith(" 4999")
    assert len(outcome.words) == 20
    assert capsys.readouterr().err.count("\n") == 5000


def test_words_that_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    program = "import os; os.write(2, b'\\xff\\xfe end\\n'); os.write(1, b'\\xff\\n')"
    assert run_build(child(program)).words == ("\ufffd\ufffd end",)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; print('hello', file=sys.stderr)"
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        assert run_build(child(program)).words == ("hello",)


# What `build-engine` does with a polite end, without the build.
CLEARS_UP = """
import signal, sys, time
from filelock import FileLock
from pathlib import Path
from vlmforge.engine.lifeline import end_with_parent
class End(BaseException): pass
def end(*_): raise End
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, end)
signal.alarm(600)  # if nothing else ends it
lock = FileLock("lock")
lock.acquire()
try:
    end_with_parent(signal.SIGTERM)
    print("builds", file=sys.stderr, flush=True)
    while True: time.sleep(0.1)  # a pause may begin just behind the signal, and never end
except End:
    Path("cleared").touch()
"""
CALLER = f"""
import sys
from vlmforge.engine.build_child import run_build
run_build([sys.executable, "-c", {CLEARS_UP!r}])
"""


@pytest.mark.parametrize("death", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_the_child_clears_up_when_its_caller_is_killed(
    tmp_path: Path, death: signal.Signals
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CALLER], stderr=subprocess.PIPE, cwd=tmp_path, text=True
    ) as caller:
        assert caller.stderr is not None
        assert caller.stderr.readline() == "builds\n"
        caller.send_signal(death)
    with FileLock(tmp_path / "lock").acquire(timeout=HANG_S):
        assert (tmp_path / "cleared").exists()


# --- where and by whom -------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "it"
    folder.mkdir()
    (folder / "config.json").write_text("{}", "utf-8")
    return folder


def answer(monkeypatch: pytest.MonkeyPatch, outcome: Outcome) -> None:
    monkeypatch.setattr(build_child, "run_build", lambda _: outcome)


@pytest.mark.usefixtures("cache")
def test_the_error_is_the_childs_own(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, Outcome(1, ERROR, ()))
    with pytest.raises(BuildError) as caught:
        pipeline(checkpoint)
    error = caught.value
    assert error.summary == (
        f"The build of {checkpoint} failed: CheckpointError: There is no model.safetensors."
    )
    assert (error.found, error.expected, error.fix) == (
        *("only config.json", "weights", "download it again"),
    )


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--tp 2", "tp=2"),
        ("a smaller --tp, or no --weights", "a smaller tp, or no --weights"),
        ("--dtype float32 or --dtype bfloat16", "dtype='float32' or dtype='bfloat16'"),
        ("another --dtype is worth it", "another dtype is worth it"),
        ("--session-len 2048; build without --tp", "session_len=2048; build without tp"),
        ("build-engine CHECKPOINT --tp N", "build-engine CHECKPOINT --tp N"),
        ("--tpu 2, --target cuda", "--tpu 2, --target cuda"),
    ],
)
def test_advice_is_in_the_words_of_the_caller(
    words: str, told: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, Outcome(1, {**ERROR, "found": words, "fix": words}, ()))
    with pytest.raises(BuildError) as caught:
        pipeline(checkpoint, EngineConfig(tp=3))
    assert (caught.value.found, caught.value.fix) == (told, told)


def test_a_place_that_the_caller_did_not_choose(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(command: list[str]) -> Outcome:
        engine = command[command.index("-o") + 1]
        told = {"summary": f"Writing the engine {engine} failed.", "fix": "choose another -o"}
        return Outcome(1, ERROR | told, ())

    monkeypatch.setattr(build_child, "run_build", full)
    with pytest.raises(BuildError) as caught:
        pipeline(checkpoint)
    assert caught.value.fix == (
        f"choose another -o (VLMFORGE_CACHE chooses another place than {cache / 'engines'})"
    )


@pytest.mark.usefixtures("cache")
def test_a_crash_is_told_by_its_last_words(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, Outcome(-11, None, ("[1.0 s] trace", "Fatal Python error")))
    with pytest.raises(BuildError) as caught:
        pipeline(checkpoint)
    assert caught.value.found == (
        "build-engine ended with status -11; it said last:\n    [1.0 s] trace\n    Fatal Python "
        "error"
    )
    answer(monkeypatch, Outcome(-9, None, ()))
    with pytest.raises(BuildError, match="was killed"):
        pipeline(checkpoint)


def test_the_second_of_two_uses_the_engine_of_the_first(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    begun, go = threading.Event(), threading.Event()
    builds: list[str] = []

    def build(command: list[str]) -> Outcome:
        engine = Path(command[command.index("-o") + 1])
        builds.append(str(engine))
        begun.set()
        assert go.wait(HANG_S)
        engine.mkdir()
        (engine / "engine.json").touch()
        return Outcome(0, None, ())

    monkeypatch.setattr(build_child, "run_build", build)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(engine_for(str(checkpoint), {})))
        for _ in range(2)
    ]
    threads[0].start()
    assert begun.wait(HANG_S)
    threads[1].start()
    said: list[str] = []

    def waits() -> bool:
        said.append(capsys.readouterr().err)
        return "waiting for the engine of" in "".join(said)

    wait_until(waits)
    go.set()
    for thread in threads:
        thread.join(HANG_S)
    assert builds == [str(found[0])]
    assert found[0] == found[1]
    assert list((cache / "engines").iterdir()) == [found[0]]  # and no lock is left


def test_no_home(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_entry(_: object) -> None:
        raise KeyError

    for name in ("HOME", "VLMFORGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    with pytest.raises(ConfigError) as caught:
        pipeline(checkpoint)
    assert "VLMFORGE_CACHE" in caught.value.fix
    assert str(os.getuid()) in caught.value.found
    with pytest.raises(ConfigError, match="~/engine names a home directory"):
        pipeline("~/engine")
    assert env.writable_cache("kernels") is None


def test_a_cache_that_cannot_be_written_to(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, Outcome(0, None, ()))
    cache.touch()
    with pytest.raises(BuildError) as caught:
        pipeline(checkpoint)
    assert caught.value.found.startswith(("Not a directory: ", "File exists: "))
    assert "VLMFORGE_CACHE" in caught.value.fix
    assert env.writable_cache("kernels") is None


def test_a_cache_that_must_not_be_looked_into(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    look = Path.exists

    def exists(path: Path, **how: bool) -> bool:
        if path.is_relative_to(cache):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **how)

    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(BuildError, match="cannot be kept") as caught:
        engine_for(str(checkpoint), {})
    assert caught.value.found.startswith("Permission denied: ")


def test_a_home_directory_is_written_as_a_tilde(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "engine.json").touch()
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert engine_for("~/it", {}) == checkpoint
    monkeypatch.setenv("VLMFORGE_CACHE", "~/kept")
    assert env.cache_dir() == checkpoint.parent / "kept"
    assert env.writable_cache("kernels") == checkpoint.parent / "kept" / "kernels"


@pytest.mark.parametrize(
    ("name", "found", "fix"),
    [
        ("nowhere", "no folder ", "check the spelling"),
        ("a/b/c", "no folder ", "check the spelling"),
        ("empty", "neither engine.json nor config.json in it", "build-engine CHECKPOINT -o ENGINE"),
        ("empty.txt", "a file", "build-engine CHECKPOINT -o ENGINE"),
        ("checkpoint/config.json", "a file", "give the folder that it is in"),
    ],
)
def test_what_is_no_checkpoint_starts_no_build(
    name: str, found: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "checkpoint").mkdir()
    for file in ("empty.txt", "checkpoint/config.json"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_child, "run_build", lambda _: pytest.fail("it builds"))
    for refuses in (
        lambda: engine_for(name, {}),
        lambda: build_cache.describe_checkpoint(name, {}, tmp_path / "described"),
    ):
        with pytest.raises(BuildError, match="is neither an engine nor a checkpoint") as caught:
            refuses()
        assert caught.value.found.startswith(found)
        assert caught.value.fix.startswith(fix)


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_engine_that_cannot_be_cut_starts_no_build(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this engine there is nothing but what it says of itself."""
    kv = MANIFEST.kv if ranks > 1 else structs.replace(MANIFEST.kv, page_size=64, dtype="float16")
    manifest = structs.replace(MANIFEST, kv=kv, parallel=ParallelLayout(tp=ranks))
    monkeypatch.setattr(load, "load_manifest", lambda _: manifest)
    monkeypatch.setattr(build_child, "run_build", lambda _: pytest.fail("it builds"))
    (tmp_path / "engine.json").touch()
    with pytest.raises(ConfigError, match="cannot be divided among other ranks") as caught:
        pipeline(tmp_path, EngineConfig(tp=2))
    assert f"an engine of {ranks} for" in caught.value.found
