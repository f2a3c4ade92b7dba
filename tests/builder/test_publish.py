"""Who may build an output: one at a time, for as long as it lives, in whatever container."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import HANGS
from vlmforge.errors import BuildError
from vlmforge_builder import build as build_module
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress
from vlmforge_builder.publish import sole_build, staging

# Builds until its input ends. "forged" stands in for a namespace where none may be made.
BUILDER = """
import os, sys
from pathlib import Path
if sys.argv[2] == "forged":
    os.getpid = lambda: 1
from vlmforge.errors import BuildError
from vlmforge_builder.publish import sole_build, staging
target = Path(sys.argv[1])
try:
    with sole_build(target, None), staging(target) as folder:
        (folder / "engine.json").write_text("{}", "utf-8")
        print("builds as", os.getpid(), flush=True)
        sys.stdin.read()
    print("published", flush=True)
except BuildError as error:
    print(f"{error.summary} {error.found}", flush=True)
"""
_NAMESPACES = (
    ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"],
    ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"],
)


def namespace() -> list[str]:
    """A command that runs another in a process namespace of its own, if this user may."""
    for command in _NAMESPACES if shutil.which("unshare") else ():
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    return []


def builder(target: Path, prefix: list[str]) -> subprocess.Popen[str]:
    """A build of `target` by a process whose id is 1, as the only program of a container is."""
    how = "real" if prefix else "forged"
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", BUILDER, str(target), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_containers_and_one_volume(tmp_path: Path) -> None:
    target, prefix = tmp_path / "e", namespace()
    with builder(target, prefix) as first, builder(target, prefix) as later:
        # Both have the same process id, and neither sees the other's.
        said = [line(first), line(later)]
        if said[1] == "builds as 1":
            first, later, said = later, first, said[::-1]
        assert said[0] == "builds as 1"
        refused = f"Another build is writing {target}. "
        assert said[1].startswith(refused)  # it may have come before the first one had said who
        later.communicate()
        with builder(target, prefix) as last:
            assert line(last).startswith(f"{refused}process 1 on ")
            last.communicate()
        assert len([name for name in names(tmp_path) if ".building-" in name]) == 1
        assert first.communicate()[0] == "published\n"
    assert names(tmp_path) == ["e"]


def test_a_killed_container_is_no_hindrance_and_is_swept(tmp_path: Path) -> None:
    target, prefix = tmp_path / "e", namespace()
    with builder(target, prefix) as first:
        assert line(first) == "builds as 1"
        first.kill()
        assert line(first) == ""  # its process in the namespace has ended too
    assert not target.exists()
    with builder(target, prefix) as second:
        assert line(second) == "builds as 1"
        assert len([name for name in names(tmp_path) if ".building-" in name]) == 1
        second.communicate()
    assert names(tmp_path) == ["e"]


NAMES = st.text(st.sampled_from("ab[]*?.-1"), min_size=1, max_size=4)


FEW = st.sets(NAMES, max_size=3)


@settings(max_examples=30)
@given(name=NAMES.filter(lambda n: n.strip(".")), others=FEW, marks=FEW)
def test_what_dead_builds_left_is_swept_and_nothing_else(
    name: str, others: set[str], marks: set[str]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        target = folder / name
        foreign = {f"x{other}" for other in others} | {f".x{name}.building-{os.getpid()}"}
        own = {f".{name}.building-{mark}" for mark in (*marks, "1", str(os.getpid()))}
        for path in (*foreign, *own):
            (folder / path).mkdir()
        with sole_build(target, None), staging(target) as staged:
            assert set(names(folder)) == foreign | {staged.name, f".{name}.building.lock"}
        assert set(names(folder)) == foreign | {name}


def test_an_engine_between_two_renames_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".e.building-abc-old").mkdir()
    (tmp_path / ".e.building-abc-old/engine.json").write_text("{}", "utf-8")
    with sole_build(tmp_path / "e", None):
        assert (tmp_path / "e/engine.json").exists()
    assert names(tmp_path) == ["e"]


def test_the_engine_behind_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with sole_build(tmp_path / "link", None):
        with pytest.raises(BuildError, match="Another build"), sole_build(tmp_path / "there", None):
            raise AssertionError("two builds of one engine")
        with staging(tmp_path / "link") as staged:
            (staged / "engine.json").write_text("{}", "utf-8")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "there") == ["engine.json"]
    assert names(tmp_path) == ["link", "there"]


def test_a_failure_gives_the_right_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), sole_build(tmp_path / "e", None), staging(tmp_path / "e"):
        raise KeyError
    assert names(tmp_path) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(BuildError) as caught, sole_build(tmp_path / "e", None):
        raise AssertionError("a build that nothing guards")
    assert "has locks" in caught.value.expected
    assert "Function not implemented" in caught.value.found


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(BuildError, match="cannot be written to"),
        sole_build(tmp_path / "file" / "e", None),
    ):
        raise AssertionError("it cannot be written to")


# --- the build --------------------------------------------------------------------------------


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Outputs of builds that do nothing else."""
    done: list[Path] = []
    monkeypatch.setattr(build_module, "read_checkpoint", lambda *_: None)
    monkeypatch.setattr(build_module, "_is_current", lambda options, _: options.output in done)
    monkeypatch.setattr(build_module, "_write", lambda _, options, __: done.append(options.output))
    return done


def test_a_second_build_is_refused(tmp_path: Path, written: list[Path]) -> None:
    options = BuildOptions("org/name", tmp_path / "e")
    with (
        Progress(text=sys.stderr) as progress,
        sole_build(options.output, None),
        pytest.raises(BuildError, match="Another build is writing") as caught,
    ):
        build_engine(options, progress)
    assert caught.value.found.startswith(f"process {os.getpid()} on ")
    assert "--wait" in caught.value.fix
    assert written == []


def test_or_it_waits_and_uses_what_the_first_made(
    tmp_path: Path, written: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = BuildOptions("org/name", tmp_path / "e", wait=True)
    notes: list[str] = []
    with Progress(text=sys.stderr) as progress:
        noted = threading.Event()

        def note(text: str) -> None:
            notes.append(text)
            noted.set()

        progress.note = note  # type: ignore[method-assign]
        second = threading.Thread(target=build_engine, args=(options, progress))
        with sole_build(options.output, None):
            second.start()
            assert noted.wait(HANGS)
            written.append(options.output)
        second.join(HANGS)
    assert not second.is_alive()
    assert notes[0].startswith(f"waiting for another build of it: process {os.getpid()} on ")
    assert notes[1:] == [f"{options.output} is up to date; --force builds it again"]
    assert written == [options.output]
    assert names(tmp_path) == []
