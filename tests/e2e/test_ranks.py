"""Engines of several ranks, through `pipeline()`: they answer as one rank does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import HANGS, HF, IMAGES, divided_engine, wait_until
from golden_models import CASES, FOLDERS, TOLERANCES, Golden, cases_of, check_answer, check_prompt
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Session, pipeline
from vlmforge.engine.manifest import load_manifest
from vlmforge.errors import ConfigError

pytestmark = pytest.mark.usefixtures("patient_ranks")
LIMITS = TOLERANCES["float32"]


PICTURE = str(IMAGES / "tall_300x900.png")
GREEDY = GenerationConfig(max_new_tokens=16, ignore_eos=True)
PROMPTS = ["hi", ("What is this?", PICTURE), "One more, and longer than the first.", "hi"]


@pytest.fixture(scope="module")
def two(shared: Path) -> Iterator[Pipeline]:
    """A pipeline of two ranks, with few places so that requests wait for them."""
    with pipeline(divided_engine(shared, HF.name, 2), EngineConfig(tp=2, max_batch_size=3)) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def one(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, EngineConfig(max_batch_size=3)) as pipe:
        yield pipe


@pytest.mark.parametrize("name", [case["id"] for case in cases_of(HF.name)])
def test_every_golden_case(two: Pipeline, name: str) -> None:
    golden = Golden(HF.name, two)
    check_prompt(golden, name)
    check_answer(golden, name, LIMITS)


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_golden_checkpoint(shared: Path, folder: str, ranks: int) -> None:
    """With fewer heads of keys than ranks too; where heads cannot be dealt out, it says so."""
    try:
        engine = divided_engine(shared, folder, ranks)
    except ConfigError as error:
        assert str(ranks) in error.found
        return
    assert load_manifest(engine).parallel.tp == ranks
    with pipeline(engine) as pipe:
        golden = Golden(folder, pipe)
        for name in (name for of, name in CASES if of == folder):
            check_answer(golden, name, LIMITS)


def test_a_batch_is_as_each_of_it_alone_and_as_one_rank(one: Pipeline, two: Pipeline) -> None:
    together = two(PROMPTS, GREEDY)
    assert [r.token_ids for r in together] == [two(p, GREEDY).token_ids for p in PROMPTS]
    assert [r.token_ids for r in together] == [r.token_ids for r in one(PROMPTS, GREEDY)]
    assert together[1].token_ids != together[0].token_ids


def test_a_stream_that_is_left_and_a_chat_that_reuses_its_prefix(
    one: Pipeline, two: Pipeline
) -> None:
    talks = []
    for pipe in (one, two):
        stream = pipe.stream_infer("left in the middle", GREEDY)
        first = next(stream)
        stream.close()
        session = pipe.chat(("What is this?", PICTURE), gen_config=GREEDY)
        before = session.response.token_ids
        session = pipe.chat("And now?", session, GREEDY)
        assert session.response.cached_tokens > 20
        talks.append((first.token_ids, before, session.response.token_ids))
    assert talks[0] == talks[1]


def test_logits_of_a_whole_prompt(one: Pipeline, two: Pipeline) -> None:
    """More than ranks give at once, so they come in pieces."""
    every = GenerationConfig(max_new_tokens=1, output_logits="all")
    found, expected = (pipe(("What is this? " * 40, PICTURE), every) for pipe in (two, one))
    assert found.logits is not None and expected.logits is not None
    assert len(found.logits) > 200
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-3, rtol=0)


def test_a_saved_session_brings_the_cache_of_all_ranks(
    shared: Path, two: Pipeline, tmp_path: Path
) -> None:
    session = two.chat(("What is this?", PICTURE), gen_config=GREEDY)
    session.save(tmp_path / "talk")
    expected = two.chat("Go on.", session, GREEDY).response.token_ids
    with pipeline(divided_engine(shared, HF.name, 2)) as again:
        restored = Session.load(tmp_path / "talk", again)
        response = again.chat("Go on.", restored, GREEDY).response
    assert response.token_ids == expected
    assert response.cached_tokens > 20


def test_an_engine_is_cut_once_for_as_many_ranks_as_are_asked_for(
    hf_engine: Path, one: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMFORGE_CACHE", str(tmp_path))
    for _ in range(2):
        with pipeline(hf_engine, tp=2) as pipe:
            assert pipe.manifest.parallel.tp == 2
            assert pipe("hi", GREEDY).token_ids == one("hi", GREEDY).token_ids
    assert len([*(tmp_path / "engines").glob("*/engine.json")]) == 1


PROGRAM = """
import os, sys, threading
from vlmforge import GenerationConfig, pipeline
print("once")
made = []
threading.Thread(target=lambda: made.append(pipeline({engine!r}))).start()
while not made:
    pass
pipe = made[0]
if (child := os.fork()) == 0:  # it outlives us, and holds none of the ranks
    os.close(1), os.close(2)
    sys.stdin.close()
    import time
    time.sleep(600)
print(pipe("hi", GenerationConfig(max_new_tokens=16, ignore_eos=True)).token_ids)
print(child)
"""


def test_a_program_from_standard_input_without_a_guard(
    shared: Path, one: Pipeline, tmp_path: Path
) -> None:
    """It makes the pipeline in a thread that ends, forks, and ends without closing anything."""
    program = PROGRAM.format(engine=str(divided_engine(shared, HF.name, 2)))
    done = subprocess.run(
        [sys.executable], input=program, text=True, capture_output=True, check=False, timeout=HANGS
    )
    first, tokens, child = done.stdout.splitlines()
    os.kill(int(child), 9)
    assert (first, tokens) == ("once", str(one("hi", GREEDY).token_ids))
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


MPI = """
import sys
from vlmforge import EngineConfig, GenerationConfig, pipeline
from vlmforge.backends.ranks import mpi
mpi.SILENT_S = 600  # no rank hangs here, however busy the machine is
config = EngineConfig(tp=2, communicator="mpi")
greedy = GenerationConfig(max_new_tokens=16, ignore_eos=True)
with pipeline(sys.argv[1], config) as pipe:
    print(pipe("hi", greedy).token_ids)
pipe = pipeline(sys.argv[1], config)  # it is never closed
print(pipe("hi", greedy).token_ids)
"""
HANGING = """
import os, signal, sys
from pathlib import Path
from vlmforge import EngineConfig, pipeline
from vlmforge.backends.ranks import mpi
from vlmforge.errors import RankError
patience, mpi.SILENT_S = mpi.SILENT_S, 600  # until one hangs, none does
Path(f"{os.environ['PMI_RANK']}.pid").write_text(str(os.getpid()))
config = EngineConfig(tp=2, communicator="mpi")
pipe = pipeline(sys.argv[1], config)
pipe("hi")
mpi.SILENT_S = patience
os.kill(int(Path("1.pid").read_text()), signal.SIGSTOP)
for ask in (lambda: pipe("hi"), lambda: pipe("again"), lambda: pipeline(sys.argv[1], config)):
    try:
        ask()
    except RankError as error:
        print(error.found)
"""


def started(program: str, engine: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """What mpirun and two ranks of the program say."""
    (folder / "app.py").write_text(program, "utf-8")
    mpirun = Path(sys.executable).with_name("mpirun")
    command = [mpirun, "-n", "2", sys.executable, "app.py", engine]
    return subprocess.run(
        command, cwd=folder, text=True, capture_output=True, check=False, timeout=HANGS
    )


def test_a_program_that_mpirun_has_started(shared: Path, one: Pipeline, tmp_path: Path) -> None:
    done = started(MPI, divided_engine(shared, HF.name, 2), tmp_path)
    assert done.stdout.splitlines() == 2 * [str(one("hi", GREEDY).token_ids)]
    assert done.returncode == 0


@pytest.mark.nightly
def test_a_rank_of_mpirun_hangs(shared: Path, tmp_path: Path) -> None:
    """The program hears of it, and its end is that of all."""
    done = started(HANGING, divided_engine(shared, HF.name, 2), tmp_path)
    first, second, third = done.stdout.splitlines()
    assert first == second == third == "rank 1: it hangs: no sign of it for 3.5 seconds"
    assert done.returncode != 0
    process = Path("/proc", (tmp_path / "1.pid").read_text("utf-8"), "stat")
    wait_until(lambda: not process.exists() or ") Z " in process.read_text("utf-8"))
