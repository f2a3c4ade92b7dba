"""A session outlives its process: killed, restored in a new one, it goes on as if nothing was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import HF, IMAGES, golden_engine

PROGRAM = """
import json, os, signal, sys
from vlmforge import EngineConfig, GenerationConfig, Session, pipeline

engine, path, step, image = sys.argv[1:]
pipe = pipeline(engine, backend_config=EngineConfig(threads=1))
greedy = GenerationConfig(max_new_tokens=64, ignore_eos=True)

def go_on(session):
    response = pipe.chat("Go on.", session, greedy).response
    print(json.dumps([response.token_ids, response.cached_tokens, response.timings.cached_images]),
          flush=True)

if step == "save":
    session = pipe.chat(("What is this?", image), gen_config=GenerationConfig(max_new_tokens=9))
    tokens = session.save(path)
    go_on(session)
    os.kill(os.getpid(), signal.SIGKILL)
go_on(Session.load(path, pipe))
pipe.close()
"""


def run(engine: Path, path: Path, step: str) -> tuple[int, Any]:
    command = [sys.executable, "-c", PROGRAM, engine, path, step, IMAGES / "tall_300x900.png"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize(
    "name",
    [HF.name, pytest.param("qwen_vl_chat", marks=pytest.mark.nightly)],
)
def test_the_next_64_tokens_are_the_same(shared: Path, tmp_path: Path, name: str) -> None:
    engine, path = golden_engine(shared, name), tmp_path / "talk.session"
    status, expected = run(engine, path, "save")
    assert status == -signal.SIGKILL
    status, found = run(engine, path, "load")
    assert status == 0
    assert found == expected
    tokens, cached, images = found
    assert (len(tokens), images) == (64, 1)
    if name == HF.name:  # of the other, the second turn has another rotary level
        assert cached > 20
