"""A rank that dies or hangs ends what is in flight, with its name, and leaves nothing behind.

A few of the kills and cycles that `scripts/kill_ranks.py` draws.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import HANGS, HF, ROOT, divided_engine, wait_until
from stand_in import Gate, Parts, stand_in
from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline
from vlmforge.backends import DecoderBatch, FloatArray, LoadOptions
from vlmforge.backends.ranks import guard, processes
from vlmforge.backends.ranks.processes import Processes
from vlmforge.errors import EngineStepError, RankError, VlmforgeError

sys.path.append(str(ROOT / "scripts"))  # programs of their own, which import each other

import kill_ranks
from kill_ranks import LEADER, alive, held, kill_the_first, opened, ranks_of, strike

LONG = GenerationConfig(max_new_tokens=400, ignore_eos=True)


@pytest.fixture
def engine(shared: Path) -> Iterator[str]:
    """One of two ranks; the test leaves no process, descriptor or shared memory behind."""
    engine = divided_engine(shared, HF.name, 2)
    gc.collect()  # what others left open is closed now, not meanwhile
    before = held()
    yield str(engine)
    wait_until(lambda: not ranks_of(os.getpid()))
    wait_until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which no rank hangs: on a busy machine one may give no sign for a while."""
    for module in (processes, guard):
        monkeypatch.setattr(module, "SILENT_S", HANGS)


def sent(signum: int) -> None:
    wait_until(lambda: 1 in ranks_of(os.getpid()))
    os.kill(ranks_of(os.getpid())[1], signum)


def hold(pipe: Pipeline, number: int, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """This step waits for the gate: it is in flight, however late a signal comes."""
    decoder, steps = pipe._engine.decoder, itertools.count()
    step = decoder.step

    def held_up(batch: DecoderBatch) -> FloatArray:
        if next(steps) == number:
            gate.passed()
        return step(batch)

    monkeypatch.setattr(decoder, "step", held_up)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("point", ["load", "prefill", "decode", "idle"])
def test_a_rank_is_killed(engine: str, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    def killed() -> float:
        sent(signal.SIGKILL)
        gate.open.set()
        return 0.0

    def opened_and_held(folder: str) -> Pipeline:
        pipe = opened(folder)
        hold(pipe, 120, gate, monkeypatch)
        return pipe

    monkeypatch.setattr(kill_ranks, "opened", opened_and_held)
    with pytest.raises(RankError) as caught:
        strike(point, engine, killed, random.Random(1))
    assert caught.value.found.startswith("rank 1: it was killed by signal 9")
    assert caught.value.fix


def test_a_rank_hangs_and_all_that_is_in_flight_ends(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(engine) as pipe:
        gate = Gate()
        hold(pipe, 20, gate, monkeypatch)
        stream = pipe.stream_infer("hi", LONG)
        next(stream)
        sent(signal.SIGSTOP)
        gate.open.set()
        responses = pipe(["one", "two"], LONG)
        with pytest.raises(RankError, match="Rank 1 of 2 failed"):
            list(stream)
        assert {r.finish_reason for r in responses} == {"error"}
        assert all("rank 1: it hangs" in r.error_message for r in responses)
        with pytest.raises(RankError, match="Rank 1 of 2"):
            pipe("later")
    with opened(engine) as again:
        assert again("hi", GenerationConfig(max_new_tokens=3, ignore_eos=True)).token_ids


def test_the_first_rank_is_killed(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill_ranks, "LIMIT_S", HANGS)
    assert kill_the_first(engine, random.Random(5)) == ""


def test_ctrl_c_is_for_the_first_rank_which_ends_all(engine: str) -> None:
    """A terminal sends it to all processes of its group."""
    program = subprocess.Popen(
        [sys.executable, "-c", LEADER, engine],
        cwd=ROOT / "scripts",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "loaded\n"
    (pid,) = ranks_of(program.pid).values()
    os.killpg(program.pid, signal.SIGINT)
    _, errors = program.communicate(timeout=HANGS)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert "RankError" not in errors
    wait_until(lambda: not alive(pid))


def test_one_that_is_stopped_before_it_has_shown_itself_hangs() -> None:
    ranks = Processes(2, 8)
    (pid,) = ranks_of(os.getpid()).values()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(RankError, match="Rank 1 of 2") as caught:
        ranks.wait_until_loaded()
    assert "it hangs: no sign of it for 3.5 seconds" in caught.value.found


@pytest.mark.usefixtures("patient")
def test_what_a_rank_cannot_load_is_said_in_its_words(tmp_path: Path) -> None:
    ranks = Processes(2, 8)
    (pid,) = ranks_of(os.getpid()).values()
    with pytest.raises(RankError) as caught:
        ranks.begin(tmp_path / "none", LoadOptions(1, 64))
        ranks.wait_until_loaded()
    assert "rank 1: " in caught.value.found
    assert "is not an engine directory" in caught.value.found
    wait_until(lambda: not alive(pid))
    with pytest.raises(RankError, match="Rank 1 of 2"):
        ranks.tell(None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("patient")
def test_a_failure_of_the_first_rank_ends_the_others(engine: str) -> None:
    """They wait for it at a meeting to which it does not come."""
    with pipeline(engine, EngineConfig(max_batch_size=1)) as pipe:
        own = pipe._engine.decoder.own  # type: ignore[attr-defined]
        (pid,) = ranks_of(os.getpid()).values()
        own._places = None
        with pytest.raises(EngineStepError, match="failed while it ran"):
            pipe("hi")
        wait_until(lambda: not alive(pid))
        with pytest.raises(RankError, match="Rank 0 of 2"):
            pipe("hi")


def test_each_request_has_an_error_of_its_own() -> None:
    """And the kind of error that it is."""
    raised = RankError("Rank 1 of 2 failed.", found="rank 1: x", expected="y", fix="z")

    def fail(name: str, number: int) -> None:
        if name == "step":
            raise raised

    errors = []
    parts = Parts(1)
    parts.before = fail
    with stand_in(parts, slots=2) as pipe:
        for _ in range(2):
            with pytest.raises(VlmforgeError) as caught:
                pipe("hi")
            errors.append(caught.value)
    assert [type(error) for error in errors] == [RankError, RankError]
    assert errors[0] is not errors[1]
    assert errors[0].__cause__ is raised
