"""A window that is longer than the one an engine was built for, made when it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from conftest import HF, IMAGES, build_once, golden_engine
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from vlmforge.errors import BackendUnavailableError, ConfigError

BUILT, LONGER = 1024, 2048
LONG = "".join(f"Tell me of {i}, the house. " for i in range(95))
PHOTO = str(IMAGES / "photo_640x480.png")
GREEDY = GenerationConfig(max_new_tokens=8, ignore_eos=True, output_logits="generation")


def opened(engine: Path, **config: Any) -> Pipeline:
    return pipeline(engine, EngineConfig(threads=1, max_batch_size=2, **config))


@pytest.fixture(scope="module")
def longer(hf_engine: Path) -> Iterator[Pipeline]:
    with opened(hf_engine, session_len=LONGER) as pipe:
        yield pipe


def answer(pipe: Pipeline, prompt: object) -> Response:
    response = pipe(prompt, gen_config=GREEDY)
    assert isinstance(response, Response)
    return response


@pytest.mark.parametrize("prompt", ["What is it?", ("Tell " * 150, PHOTO)], ids=["short", "full"])
def test_up_to_the_built_window_nothing_changes(
    hf_engine: Path, longer: Pipeline, prompt: object
) -> None:
    with opened(hf_engine) as pipe:
        built = answer(pipe, prompt)
    made = answer(longer, prompt)
    assert made.token_ids == built.token_ids
    assert made.logits is not None
    np.testing.assert_array_equal(made.logits, built.logits)


def test_an_engine_built_for_the_longer_window_answers_the_same(
    shared: Path, longer: Pipeline
) -> None:
    options = ("--session-len", LONGER, "--skip-goldens")
    built = build_once(shared / "hf.longer.engine", HF / "checkpoint", *options)
    with opened(built) as pipe:
        assert pipe._engine.options.capacity == LONGER
        for prompt in (LONG, (LONG, PHOTO)):
            one, other = answer(longer, prompt), answer(pipe, prompt)
            assert one.input_token_len > BUILT
            assert one.token_ids == other.token_ids
            np.testing.assert_array_equal(one.logits, other.logits)


def test_beyond_it_answers_are_those_of_transformers(longer: Pipeline) -> None:
    prompt = longer.render(LONG).token_ids
    assert BUILT + 300 < len(prompt) < LONGER - 8
    model = LlavaForConditionalGeneration.from_pretrained(HF / "checkpoint", dtype=torch.float32)
    ids = torch.tensor([prompt])
    expected = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = answer(longer, LONG)
    assert found.token_ids == expected.sequences[0, ids.shape[1] :].tolist()
    assert found.logits is not None
    logits = torch.cat(expected.logits).numpy()
    np.testing.assert_allclose(found.logits, logits, atol=5e-3, rtol=0)


def test_beyond_the_trained_length_it_warns_once(
    hf_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vlmforge"):
        opened(hf_engine, session_len=4096).close()
        assert "trained" not in caplog.text
        opened(hf_engine, session_len=4160).close()
    warnings = [record for record in caplog.records if "trained" in record.getMessage()]
    (warning,) = warnings
    assert "session_len=4160 is beyond the 4096 tokens" in warning.getMessage()


def test_what_memory_cannot_hold_is_refused(hf_engine: Path) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        opened(hf_engine, session_len=10**12)
    assert "for the cache, by" in caught.value.found
    assert "for 1000000000000 tokens" in caught.value.expected
    assert "smaller window" in caught.value.fix


def test_levels_are_compiled_in(shared: Path) -> None:
    engine = golden_engine(shared, "qwen_vl_chat")
    with pytest.raises(ConfigError) as caught:
        opened(engine, session_len=8193)
    assert caught.value.expected == "at most 8192"
    assert "--session-len 8193 --force" in caught.value.fix
