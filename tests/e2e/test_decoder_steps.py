"""A decoder of ONNX Runtime: what its steps keep bound changes nothing, and what they need goes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from vlmforge import EngineConfig, pipeline
from vlmforge.api import memory
from vlmforge.backends import onnxruntime
from vlmforge.runner.decoder_input import DecoderInput
from vlmforge.runner.stages import Engine

TEXT, IMAGE, LOGITS = 5, 7, ("none", "last", "all")


@pytest.fixture(scope="module")
def engine(hf_engine: Path) -> Iterator[Engine]:
    config = EngineConfig(max_batch_size=3, threads=1)
    with pipeline(hf_engine, backend_config=config) as pipe:
        yield pipe._engine


def prompt(engine: Engine, seed: int) -> DecoderInput:
    """Text, an image's rows, text."""
    rng, decode = np.random.default_rng(seed), engine.manifest.decode
    before, behind = rng.integers(3, decode.vocab_size, (2, TEXT))
    rows = decode.vocab_size + np.arange(IMAGE)
    features = rng.standard_normal((IMAGE, engine.manifest.decode.hidden_size))
    ids = np.concatenate((before, rows, behind)).astype(np.int64)
    return DecoderInput(ids, features.astype(np.float32))


@given(st.integers(0, 2), st.data())
@settings(max_examples=examples(30))
def test_a_prompt_in_parts_has_the_logits_of_the_whole(
    engine: Engine, slot: int, data: st.DataObject
) -> None:
    asked = prompt(engine, data.draw(st.integers(0, 99)))
    whole = engine.prefill((0,), asked, 0, logits="all")
    start, most = 0, len(asked.ids)
    while start < most:
        stop = data.draw(st.integers(start + 1, most))
        logits = data.draw(st.sampled_from(LOGITS))
        part = DecoderInput(asked.ids[start:stop], asked.features)
        found = engine.prefill((slot,), part, start, logits=logits)
        expected = {"none": whole[:0], "last": whole[stop - 1 : stop], "all": whole[start:stop]}
        np.testing.assert_allclose(found, expected[logits], rtol=1e-3, atol=1e-4)
        start = stop


@pytest.mark.parametrize("slots", [(0,), (0, 1, 2), (2, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("broken", [None, 0, 2])
def test_the_likeliest_are_those_of_the_logits(
    engine: Engine, slots: tuple[int, ...], broken: int | None
) -> None:
    """In the order that is asked for; -1 where what is in the cache makes no finite number."""
    lengths = np.array([2 * TEXT + IMAGE] * len(slots))
    for slot in range(3):
        asked = prompt(engine, slot)
        assert asked.features is not None
        if slot == broken:
            asked.features[3] = np.nan
        engine.prefill((slot,), asked, 0, logits="none")
    given = [(slot,) for slot in slots], np.array(slots) + 20, lengths, np.zeros_like(lengths)
    logits = np.array(engine.decode(*given))
    found = engine.decode(*given, likeliest=True)
    expected = [
        -1 if slot == broken else row.argmax() for slot, row in zip(slots, logits, strict=True)
    ]
    assert isinstance(found, np.ndarray) and found.dtype == np.int64
    assert found.tolist() == expected


@pytest.mark.parametrize("logits", LOGITS)
def test_features_are_let_go_once_they_have_been_run(engine: Engine, logits: str) -> None:
    asked = prompt(engine, 0)
    assert asked.features is not None
    there = weakref.ref(asked.features)
    engine.prefill((1,), asked, 0, logits=logits)  # type: ignore[arg-type]
    del asked
    gc.collect()
    assert there() is None


def test_where_memory_is_short_what_loading_took_is_given_back_before_more_is_loaded(
    hf_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    load, give_back = onnxruntime.ort.InferenceSession, onnxruntime.return_freed_memory

    def loaded(*given: Any, **named: Any) -> object:
        events.append("load")
        return load(*given, **named)

    def given_back() -> None:
        events.append("give back")
        give_back()

    monkeypatch.setattr(onnxruntime.ort, "InferenceSession", loaded)
    monkeypatch.setattr(onnxruntime, "return_freed_memory", given_back)
    monkeypatch.setattr(memory, "_PACK_SHARE", 0)
    pipeline(hf_engine, backend_config=EngineConfig(threads=1)).close()
    assert events == ["load", "give back"] * 2  # the vision part's, and the decoder's
