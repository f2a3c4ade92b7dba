"""`build-engine` from the outside: what it publishes, refuses, keeps, and says while it works."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conftest import HANGS, HF, ROOT, wait_until
from heavy_checkpoint import HEAVY
from vlmforge.engine.bundle import open_bundle
from vlmforge.engine.manifest import MANIFEST_FILE, load_manifest
from vlmforge.errors import BuildError, EngineError
from vlmforge_builder import build as build_module
from vlmforge_builder import cli, progress
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress
from vlmforge_recipes.llava.synthetic import write_checkpoint

CHECKPOINT = HF / "checkpoint"
TOWER = "openai/clip-vit-large-patch14-336"
TEMPLATE = {
    "model_name": "mine",
    "user": "Q: ",
    "eoh": " ",
    "assistant": "A:",
    "stop_words": ["##"],
}


def build(checkpoint: Path, engine: Path, **options: Any) -> str:
    """Build in this process; returns what was said."""
    said = io.StringIO()
    with Progress(text=said) as spoken:
        build_engine(BuildOptions(str(checkpoint), engine, **options), spoken)
    return said.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def times(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file."""
    stats = {str(path): path.stat() for path in (folder, *folder.rglob("*"))}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".building-" in path.name]


def test_an_engine_does_not_tell_where_it_was_built(built: Built) -> None:
    provenance = load_manifest(built.engine).provenance
    assert provenance.source == built.checkpoint.name == "checkpoint"
    places = [str(place).encode() for place in (built.checkpoint, built.engine, ROOT)]
    told = [name for name, data in contents(built.engine).items() if any(p in data for p in places)]
    assert told == []


def test_files_among_the_options_are_recorded_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "tower").mkdir()
    template = tmp_path / "mine.json"
    template.write_text("{}", "utf-8")
    options = BuildOptions(
        "c", tmp_path / "e", vision_tower=str(tmp_path / "tower"), chat_template=str(template)
    )
    before = options.recorded()
    assert before["vision_tower"] == "tower"
    assert before["chat_template"].startswith("mine.json sha256:44136fa3")
    template.write_text('{"model_name": "mine"}', "utf-8")
    assert options.recorded()["chat_template"] != before["chat_template"]
    plain = replace(options, vision_tower="org/tower", chat_template="vicuna").recorded()
    assert (plain["vision_tower"], plain["chat_template"]) == ("org/tower", "vicuna")
    assert BuildOptions("c", tmp_path / "e").recorded()["vision_tower"] == "None"


@dataclass(frozen=True)
class Built:
    engine: Path
    checkpoint: Path
    events: list[dict[str, Any]]


def _on_one_processor() -> None:
    """As the builds in this process: the last bits of goldens hang on the number of threads."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """One build by the command itself, with its events. Tests must leave the engine as it is.

    It shares no traces, and is of a checkpoint whose weights are seen in the memory that it takes.
    """
    folder = tmp_path_factory.mktemp("built")
    checkpoint = write_checkpoint(folder / "checkpoint", HEAVY)
    engine, events = folder / "it.engine", folder / "events.jsonl"
    command = [sys.executable, "-m", "vlmforge_builder", str(checkpoint), "-o", str(engine)]
    done = subprocess.run(
        [*command, "--json-events", str(events)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=_on_one_processor,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
    return Built(engine, checkpoint, rows)


@pytest.fixture
def copy(built: Built, tmp_path: Path) -> Built:
    """The engine again, to be changed."""
    engine = tmp_path / "copy.engine"
    shutil.copytree(built.engine, engine, copy_function=_copied)
    return replace(built, engine=engine)


def _copied(source: str, target: str) -> None:
    """Weights are large, and no test writes into them."""
    (os.link if source.endswith(".data") else shutil.copy2)(source, target)


# --- the same again ---------------------------------------------------------------------------


def test_the_same_again_is_a_no_op(built: Built) -> None:
    before = times(built.engine)
    said = build(built.checkpoint, built.engine)
    assert f"{built.engine} is up to date; --force builds it again" in said
    assert "trace" not in said
    assert times(built.engine) == before


def test_forced_it_is_identical_but_for_its_time(
    copy: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copy.engine)
    inode = copy.engine.stat().st_ino
    built_at = load_manifest(copy.engine).provenance.built_at
    while time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()) == built_at:
        time.sleep(0.1)
    build(copy.checkpoint, copy.engine, force=True)
    after = contents(copy.engine)
    assert copy.engine.stat().st_ino != inode
    first, second = (json.loads(files.pop(MANIFEST_FILE)) for files in (before, after))
    assert after == before
    assert first["provenance"].pop("built_at") != second["provenance"].pop("built_at")
    assert first.pop("digest") != second.pop("digest")  # it is of the time too
    assert first == second
    assert not leftovers(copy.engine.parent)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"session_len": 512},
        {"max_batch_size": 2},
        {"chat_template": "vicuna"},
    ],
    ids=str,
)
def test_other_options_are_not_taken_for_the_same(built: Built, options: dict[str, Any]) -> None:
    before = times(built.engine)
    with pytest.raises(BuildError) as caught:
        build(built.checkpoint, built.engine, **options)
    words = str(caught.value)
    assert f"{built.engine} is an engine of other inputs, options or versions." in words
    assert f"an engine of {built.checkpoint.name}\n" in words
    assert "add --force to replace it, or choose another -o" in words
    assert times(built.engine) == before


def test_other_weights_are_not_taken_for_the_same(built: Built, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "checkpoint", replace(HEAVY, seed=1))
    with pytest.raises(BuildError, match="of other inputs, options or versions"):
        build(other, built.engine)


def test_other_versions_are_not_taken_for_the_same(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = dict(load_manifest(built.engine).provenance.versions)
    monkeypatch.setattr(build_module, "_versions", lambda: {**now, "torch": "0.1"})
    with pytest.raises(BuildError, match="of other inputs, options or versions"):
        build(built.checkpoint, built.engine)


def test_an_engine_of_another_schema_needs_force(copy: Built) -> None:
    path = copy.engine / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "schema_version": 0}))
    with pytest.raises(BuildError, match="an engine of another schema version"):
        build(copy.checkpoint, copy.engine)


def test_a_damaged_engine_is_built_again(copy: Built) -> None:
    expected = contents(copy.engine)
    (copy.engine / "tokenizer.json").write_bytes(b"{}")
    (copy.engine / "decoder.rank0.data").unlink()
    with pytest.raises(EngineError):
        open_bundle(copy.engine)
    assert "up to date" not in build(copy.checkpoint, copy.engine)
    found = contents(copy.engine)
    for files in (expected, found):
        files.pop(MANIFEST_FILE)
    assert found == expected


# --- events -----------------------------------------------------------------------------------


def test_events_tell_stages_time_and_memory(built: Built) -> None:
    rows = built.events
    begun = [row["stage"] for row in rows if row["event"] == "begin"]
    ended = [row["stage"] for row in rows if row["event"] == "end"]
    assert begun == ended
    assert begun == [
        "read the checkpoint",
        *("trace vision", "write vision", "trace decoder", "write decoder"),
        *("run the goldens", "checksums"),
    ]
    elapsed = [row["elapsed_s"] for row in rows]
    assert elapsed == sorted(elapsed)
    seconds = [row["seconds"] for row in rows if row["event"] == "end"]
    assert all(value >= 0 for value in seconds)
    assert sum(seconds) <= elapsed[-1] + 0.01 * len(seconds)
    for key in ("peak_rss_bytes", "peak_anonymous_bytes"):
        peaks = [row[key] for row in rows]
        assert peaks == sorted(peaks)
    assert rows[-1]["peak_rss_bytes"] >= rows[-1]["peak_anonymous_bytes"] > 50 << 20
    assert f"built {built.engine}" in rows[-2]["text"]


def test_weights_are_streamed(built: Built) -> None:
    """Bytes that only this process holds; mapped files do not count, the system can drop them."""
    weights = sum(path.stat().st_size for path in built.checkpoint.glob("*.safetensors"))
    assert weights > 120 << 20
    rows = built.events
    peaks = {(row["event"], row["stage"]): row["peak_anonymous_bytes"] for row in rows}
    before = peaks["begin", "write vision"]  # the libraries, and no weights yet
    # A decoder that was held whole would be three quarters of the weights.
    assert peaks["end", "write decoder"] - before < weights / 2
    # The goldens run on mapped weights; what they add is activations and the cache.
    assert rows[-1]["peak_anonymous_bytes"] - before < weights
    written = [row["done_bytes"] for row in rows if (row["event"], row["stage"])[0] == "end"]
    assert max(written) >= weights * 0.6


def test_events_on_stdout(
    built: Built, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert cli.main([str(built.checkpoint), "-o", str(built.engine), "--json-events", "-"]) == 0
    out, err = capsys.readouterr()
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    assert all(text in err for text in texts)
    assert any("up to date" in text for text in texts)


def watched(monkeypatch: pytest.MonkeyPatch, heartbeat: float) -> list[None]:
    """Sets the heartbeat; the list grows by one whenever the watch looks at the memory."""
    looks: list[None] = []
    now = progress.memory_now

    def counted() -> progress.Memory:
        looks.append(None)
        return now()

    monkeypatch.setattr(progress, "HEARTBEAT_S", heartbeat)
    monkeypatch.setattr(progress, "memory_now", counted)
    return looks


def wait_for_looks(looks: list[None], count: int) -> None:
    before = len(looks)
    wait_until(lambda: len(looks) >= before + count)


def test_a_stage_is_silent_until_the_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress.HEARTBEAT_S == 5.0
    looks, events = watched(monkeypatch, heartbeat=2 * HANGS), io.StringIO()
    with Progress(text=io.StringIO(), events=events) as spoken, spoken.stage("write"):
        wait_for_looks(looks, 4)
    rows = [json.loads(line) for line in events.getvalue().splitlines()]
    assert [row["event"] for row in rows] == ["begin", "end"]


def test_a_stage_speaks_at_every_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = watched(monkeypatch, heartbeat=0.4)
    said, events = io.StringIO(), io.StringIO()
    with Progress(text=said, events=events) as spoken:
        with spoken.stage("write"):
            spoken.report(3, 4)
            wait_until(lambda: events.getvalue().count("heartbeat") >= 2)
        monkeypatch.setattr(progress, "HEARTBEAT_S", 0.0)
        wait_for_looks(looks, 4)  # between stages there is nothing to tell
    rows = [json.loads(line) for line in events.getvalue().splitlines()]
    kinds = [row["event"] for row in rows]
    assert kinds[0] == "begin"
    assert kinds[-1] == "end"
    beats = rows[1:-1]
    assert {row["event"] for row in beats} == {"heartbeat"}
    assert all(b["elapsed_s"] - a["elapsed_s"] > 0.25 for a, b in pairwise(rows[:-1]))
    assert {row["text"] for row in beats} == {"write 75% ..."}
    assert {(row["done_bytes"], row["total_bytes"]) for row in beats} == {(3, 4)}
    assert len(said.getvalue().splitlines()) == len(rows)


def test_events_that_cannot_be_written(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    events = tmp_path / "nowhere" / "events.jsonl"
    arguments = [str(built.checkpoint), "-o", str(tmp_path / "e"), "--json-events", str(events)]
    assert cli.main(arguments) == 1
    assert f"The file for the JSON events cannot be written: {events}" in capsys.readouterr().err


def test_a_failed_build_keeps_the_engine_that_was_there(
    copy: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = times(copy.engine)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module, "record_goldens", fail)
    with pytest.raises(BuildError) as caught:
        build(copy.checkpoint, copy.engine, force=True)
    assert "nothing was published" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert times(copy.engine) == before
    assert not leftovers(copy.engine.parent)
