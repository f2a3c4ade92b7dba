"""A session outlives its process: killed, restored in a new one, it goes on as if nothing was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import HF, IMAGES, golden_engine
from live_parity import engine as drawn_engine
from vlmforge.backends import DecoderBatch, DecoderSession, LoadOptions, load_backend
from vlmforge.engine.manifest import load_manifest

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
    [HF.name, *(pytest.param(n, marks=pytest.mark.nightly) for n in ("qwen_vl_chat", "qwen2_vl"))],
)
def test_the_next_64_tokens_are_the_same(shared: Path, tmp_path: Path, name: str) -> None:
    drawn = name == "qwen2_vl"
    engine = drawn_engine(shared, name, "windowed") if drawn else golden_engine(shared, name)
    path = tmp_path / "talk.session"
    status, expected = run(engine, path, "save")
    assert status == -signal.SIGKILL
    status, found = run(engine, path, "load")
    assert status == 0
    assert found == expected
    tokens, cached, images = found
    assert (len(tokens), images) == (64, 1)
    if name == HF.name:  # of the other, the second turn has another rotary level
        assert cached > 20


def step(decoder: DecoderSession, slots: Sequence[int], ids: Any, past: Sequence[int]) -> Any:
    """Tokens `[B, S]` of sequences that have `past` tokens; logits after the last of each."""
    tokens = np.array(ids, np.int64)
    last = np.full((len(slots), 1), tokens.shape[1] - 1)
    return decoder.step(DecoderBatch(slots, tokens, np.array(past), None, last))[:, 0]


def test_rows_are_read_and_written_where_their_sequence_is(hf_engine: Path) -> None:
    """In a batch, sequences change places."""
    manifest = load_manifest(hf_engine)
    options, backend = LoadOptions(slots=4, capacity=32, threads=1), load_backend("onnxruntime")
    first, second = (backend.load_decoder(hf_engine, manifest, options) for _ in range(2))
    for decoder in (first, second):
        step(decoder, [0], [[1, 5, 6, 7, 8]], [0])
        step(decoder, [3], [[1, 9, 10, 11, 12]], [0])
        step(decoder, [0, 3], [[13], [14]], [5, 5])  # side by side from now on
    step(first, [1], [[1, 20, 21]], [0])
    step(first, [3, 1], [[22], [23]], [6, 3])
    rows = {slot: first.read([slot], tokens) for slot, tokens in ((0, 6), (3, 7), (1, 4))}
    second.write([2], rows[3], 0)
    second.write([3], rows[1], 0)
    for there, here, past in ((3, 2, 7), (1, 3, 4), (0, 0, 6)):
        expected = step(first, [there], [[30]], [past])
        np.testing.assert_array_equal(step(second, [here], [[30]], [past]), expected)
        found = second.read([here], past)
        assert all(np.array_equal(found[name], rows[there][name]) for name in rows[there])
