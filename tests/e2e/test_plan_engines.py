"""Engines of TensorRT-RTX, run by a stand-in for the library, answer as the originals do.

The pool, the buckets, the scheduler and every call of the library are those of a GPU; a plan's
graph is run by ONNX Runtime (`vlmforge.backends.fake_plans`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from conftest import HF, IMAGES
from golden_models import CASES, TOLERANCES, Golden, check_answer, check_images, check_prompt
from plan_engines import plan_engine
from vlmforge import EngineConfig, GenerationConfig, Pipeline, VisionConfig, pipeline
from vlmforge.api.load import serve
from vlmforge.backends.cuda.decoder import PagedDecoder
from vlmforge.backends.fake import HostDevice
from vlmforge.backends.fake_plans import VERSION, plans_on_cpu, stand_in_library
from vlmforge.backends.plans import load_plans, open_library
from vlmforge.engine.manifest import load_manifest
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import BackendUnavailableError, ConfigError, EngineError
from vlmforge_plugins.cached_attention.plugin import OPS

LIMITS = TOLERANCES["float16"]
PHOTO = str(IMAGES / "photo_640x480.png")
PROMPTS: list[object] = ["Write one line.", ("What is shown in this image?", PHOTO), "hi"]
CONFIGS = [GenerationConfig(max_new_tokens=n, ignore_eos=True) for n in (9, 4, 6)]


@pytest.fixture(scope="module")
def engine(shared: Path) -> Path:
    return plan_engine(shared, HF.name, "--session-len", "1024")


@pytest.fixture(scope="module")
def pipe(engine: Path) -> Iterator[Pipeline]:
    with plans_on_cpu("tensorrt_rtx"), pipeline(engine) as opened:
        yield opened


def device(pipe: Pipeline) -> HostDevice:
    decoder = pipe._engine.decoder
    assert isinstance(decoder, PagedDecoder)
    assert isinstance(decoder._device, HostDevice)
    return decoder._device


@pytest.mark.parametrize("case", [name for folder, name in CASES if folder == HF.name][:3])
def test_golden_cases(pipe: Pipeline, case: str) -> None:
    golden = Golden(HF.name, pipe)
    check_prompt(golden, case)
    check_answer(golden, case, LIMITS)


def test_features_of_golden_images(pipe: Pipeline) -> None:
    check_images(Golden(HF.name, pipe), LIMITS)


def test_batches_a_full_pool_and_captured_steps(pipe: Pipeline) -> None:
    singles = [pipe(p, gen_config=c).token_ids for p, c in zip(PROMPTS, CONFIGS, strict=True)]  # type: ignore[union-attr]
    before = device(pipe).replays
    batch = pipe(PROMPTS, gen_config=CONFIGS)
    assert [answer.token_ids for answer in batch] == singles  # type: ignore[union-attr]
    assert device(pipe).replays > before
    longest = max(pipe.count_tokens(prompt) for prompt in PROMPTS) + 9
    pages = -(-longest // pipe._engine.options.block_size)
    options = structs.replace(pipe._engine.options, budget=pages)
    tight = serve(
        dataclasses.replace(pipe._engine, options=options), EngineConfig(), VisionConfig()
    )
    with tight:
        answers = tight(PROMPTS[::-1], gen_config=CONFIGS[::-1])
    assert [answer.token_ids for answer in answers] == singles[::-1]  # type: ignore[union-attr]


def test_the_logits_of_a_whole_prompt_come_token_by_token(pipe: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=2, output_logits="all")
    answer = pipe("a b", gen_config=config)
    assert answer.logits is not None and np.isfinite(answer.logits).all()
    assert len(answer.logits) == answer.input_token_len + 1
    last = pipe("a b", gen_config=dataclasses.replace(config, output_logits="generation"))
    assert last.logits is not None
    np.testing.assert_allclose(answer.logits[-2:], last.logits, atol=LIMITS.logits)


def test_the_plugin_is_registered_for_both_of_its_ops(pipe: Pipeline) -> None:
    program = pipe._engine.decoder._program  # type: ignore[attr-defined]
    (plan,) = program._plans.values()
    library = plan._contexts["decode"]._library
    creators = library.trt.get_plugin_registry().creators
    assert list(creators) == [f"vlmforge::{op}" for op in OPS]


# --- what cannot be loaded ------------------------------------------------------------------------


def refused(engine: Path, kind: type[EngineError], **config: int) -> EngineError:
    with plans_on_cpu("tensorrt_rtx"), pytest.raises(kind) as caught:
        pipeline(engine, EngineConfig(**config))
    return caught.value


def test_more_than_the_plan_was_compiled_for(engine: Path) -> None:
    with plans_on_cpu("tensorrt_rtx"), pytest.raises(ConfigError) as caught:
        pipeline(engine, EngineConfig(max_batch_size=9))
    assert (caught.value.found, caught.value.expected) == ("max_batch_size=9", "at most 4")
    assert "--max-batch-size 9" in caught.value.fix


@pytest.fixture
def altered(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the engine whose files may be changed: nobody compares their sums."""
    monkeypatch.setattr("vlmforge.api.load.open_bundle", _unchecked)
    monkeypatch.setattr("vlmforge.runner.load.check_sizes", lambda *_: None)
    return shutil.copytree(engine, tmp_path / "engine")


def _unchecked(folder: Path, *_: object, **__: object) -> object:
    from vlmforge.engine.bundle import Bundle

    return Bundle(folder, load_manifest(folder))


def test_a_plan_of_another_version(altered: Path) -> None:
    plan = altered / "decoder.rank0.plan"
    plan.write_bytes(plan.read_bytes().replace(VERSION.encode(), b"1.6.0.000", 1))
    error = refused(altered, BackendUnavailableError)
    assert error.summary == f"tensorrt_rtx {VERSION} refuses the plan decoder.rank0.plan."
    assert "not compatible: expecting library version 1.7.1.116 got 1.6.0.000" in error.found
    assert "build-engine CHECKPOINT" in error.fix


def test_a_plan_of_another_part(altered: Path) -> None:
    shutil.copy(altered / "vision.plan", altered / "decoder.rank0.plan")
    error = refused(altered, EngineError)
    assert "is not the one that the engine describes" in error.summary
    assert "1 profiles, and tensors that only one of both knows" in error.found


def test_a_plan_without_an_input_that_it_does_not_use(engine: Path) -> None:
    """Libraries leave them out; outputs must be there."""
    part = load_manifest(engine).part("vision")
    library = open_library(stand_in_library("tensorrt_rtx"))
    more = TensorSpec("more", "int64", ("images",))
    load_plans(library, engine, [structs.replace(part, inputs=(*part.inputs, more))], HostDevice())
    with pytest.raises(EngineError) as caught:
        load_plans(
            library, engine, [structs.replace(part, outputs=(*part.outputs, more))], HostDevice()
        )
    assert "only one of both knows: more" in caught.value.found
