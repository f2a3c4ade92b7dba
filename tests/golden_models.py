"""The golden checkpoints of `tests/data`, and how an engine is compared with them, stage by stage.

A folder with a `cases.json` is one: `cases.json` and the `.npz` files hold what the original code
gave: token ids, pixel values, features after the projector, logits after the prompt, greedy tokens.
A `row_step` in an `image_*.npz` says that only every n-th row of each array was kept. A case is
given by `messages`, or by a `query` after a `history` whose texts spell the images' paths.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conftest import DATA
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from vlmforge.engine.manifest import load_manifest
from vlmforge.runner.features import FeatureCache
from vlmforge.vl import load_image

FOLDERS = tuple(sorted(path.parent.name for path in DATA.glob("*/cases.json")))
# Of the architectures of two others; only their files and sizes differ, which `test_goldens` sees.
TWINS = frozenset({"llava_next_mistral_hf", "llava_v1_5_liuhaotian"})
_TAG = re.compile(r"<image(?:_placeholder)?>\n")


@dataclass(frozen=True)
class Tolerances:
    """Largest absolute differences; greedy tokens count up to the first margin below `margin`."""

    pixels: float
    features: float
    features_mean: float
    logits: float
    margin: float


TOLERANCES = {
    "float32": Tolerances(1e-5, 2e-3, 2e-3, 5e-3, 0.0),
    "float16": Tolerances(1e-5 + 1e-3, 3e-2, 3e-3, 0.1, 0.1),
    "bfloat16": Tolerances(1e-5 + 1e-2, 2e-1, 2e-2, 0.4, 0.4),
}


def cases_of(folder: str) -> list[dict[str, Any]]:
    """The cases of a golden checkpoint."""
    text = (DATA / folder / "cases.json").read_text("utf-8")
    whole = json.loads(text)
    return [_uniform(case, whole.get("stop_ids", ())) for case in whole["cases"]]


def _uniform(case: dict[str, Any], stop_ids: Sequence[int]) -> dict[str, Any]:
    """`greedy_tokens` up to the first that stops; the original's own loop goes on for one more."""
    if "greedy_tokens" not in case:
        raw = case["greedy_tokens_raw"]
        end = next((i for i, token in enumerate(raw) if token in stop_ids), len(raw))
        case["greedy_tokens"] = raw[: end + 1]
        assert case["greedy_tokens_generate"][: end + 1] == case["greedy_tokens"]
    return case


CASES = tuple((folder, case["id"]) for folder in FOLDERS for case in cases_of(folder))


@dataclass(frozen=True)
class Golden:
    """A golden checkpoint, and a pipeline on its engine."""

    name: str
    pipe: Pipeline

    @property
    def folder(self) -> Path:
        return DATA / self.name

    def case(self, name: str) -> dict[str, Any]:
        return next(case for case in cases_of(self.name) if case["id"] == name)

    def messages(self, case: dict[str, Any]) -> list[dict[str, Any]]:
        """The case as OpenAI messages with its images."""
        images = iter([str(DATA / image) for image in case["images"]])
        if "query" in case:  # turns that spell their images' paths
            texts = [text for turn in case["history"] for text in turn] + [case["query"]]
            return [_spelled_turn(text, i, images) for i, text in enumerate(texts)]
        if isinstance(case["messages"][0], str):  # turns of user and assistant, image tag in text
            return [_tagged_turn(text, i, images) for i, text in enumerate(case["messages"])]
        return [
            {"role": m["role"], "content": [_block(block, images) for block in m["content"]]}
            for m in case["messages"]
        ]

    def answer(self, name: str) -> Response:
        """The greedy answer to a case, as long as its golden, with the logits of each token."""
        case = self.case(name)
        steps = len(case["greedy_tokens"])
        config = GenerationConfig(max_new_tokens=steps, output_logits="generation")
        response = self.pipe(self.messages(case), gen_config=config)
        assert isinstance(response, Response)
        return response


def _tagged_turn(text: str, index: int, images: Iterator[str]) -> dict[str, Any]:
    plain, tags = _TAG.subn("", text)
    content: list[dict[str, Any]] = [{"type": "text", "text": plain}]
    content += [{"type": "image_url", "image_url": {"url": next(images)}} for _ in range(tags)]
    return {"role": "assistant" if index % 2 else "user", "content": content}


def _spelled_turn(text: str, index: int, images: Iterator[str]) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    spelled = range(text.count("<img>"))
    content += [{"type": "image_url", "image_url": {"url": next(images)}} for _ in spelled]
    return {"role": "assistant" if index % 2 else "user", "content": content}


def _block(block: dict[str, Any], images: Iterator[str]) -> dict[str, Any]:
    if block["type"] == "image":
        return {"type": "image_url", "image_url": {"url": next(images)}}
    return block


def check_prompt(golden: Golden, name: str) -> None:
    """Text and token ids are exact."""
    case = golden.case(name)
    rendered = golden.pipe.render(golden.messages(case))
    assert rendered.text == case["prompt"]
    ids = list(rendered.token_ids)
    if -200 in case["input_ids"]:  # the original writes one id for each image
        for span in reversed(rendered.image_spans):
            ids[span.start : span.start + span.length] = [-200]
        assert len(rendered.token_ids) == case["expanded_len"]
    assert ids == case["input_ids"]


def check_images(golden: Golden, limits: Tolerances) -> None:
    """Pixels and features of every golden image."""
    engine = golden.pipe._engine
    paths = sorted(golden.folder.glob("image_*.npz"))
    assert len(paths) >= 2
    for path in paths:
        arrays = np.load(path)
        step = int(arrays.get("row_step", 1))
        name = path.stem.removeprefix("image_")
        image = engine.prepare_image(load_image(DATA / "images" / f"{name}.png"))
        pixels = image.pixel_values[..., ::step, :]
        expected = arrays["pixel_values"].reshape(pixels.shape)
        np.testing.assert_allclose(pixels, expected, atol=limits.pixels, rtol=0)
        features = np.asarray(FeatureCache(engine.encode, batch=2).get([image])[0][0])
        key = "image_features" if "image_features" in arrays else "image_features_merged"
        assert engine.image_tokens(DATA / "images" / f"{name}.png") == len(features)
        gap = np.abs(features[::step] - arrays[key])
        assert gap.max() <= limits.features
        assert gap.mean() <= limits.features_mean


def check_answer(golden: Golden, name: str, limits: Tolerances) -> None:
    """Logits after the prompt and of each step, and greedy tokens while the margins allow."""
    case = golden.case(name)
    arrays = np.load(golden.folder / case["npz"])
    response = golden.answer(name)
    assert response.logits is not None
    np.testing.assert_allclose(
        response.logits[0], arrays["last_logits"], atol=limits.logits, rtol=0
    )
    close = [i for i, gap in enumerate(case["top2_margin"]) if gap < limits.margin]
    decided = min([*close, len(case["greedy_tokens"])])
    expected = case["greedy_tokens"][:decided]
    ends = bool(expected) and expected[-1] in golden.pipe._engine.manifest.decode.eos_ids
    assert response.token_ids[:decided] == (expected[:-1] if ends else expected)
    if decided == len(case["greedy_tokens"]):
        assert response.finish_reason == ("stop" if ends else "length")
    # Every step's best eight, not only its winner.
    for step, ids in enumerate(arrays["step_top8_ids"][: min(decided + 1, len(response.logits))]):
        found = response.logits[step][ids]
        top8 = arrays["step_top8_logits"][step]
        np.testing.assert_allclose(found, top8, atol=limits.logits, rtol=0)


def check_16_bit_engine(folder: str, dtype: str, engine: Path) -> None:
    """Build an engine of `dtype` at `engine`; every stage of every case is within its limits."""
    from vlmforge_builder.build import BuildOptions, build_engine  # a GPU's machine has no builder
    from vlmforge_builder.progress import Progress

    checkpoint = str(DATA / folder / "checkpoint")
    options = BuildOptions(checkpoint, engine, dtype=dtype, max_batch_size=1, skip_goldens=True)
    with Progress(text=io.StringIO()) as progress:
        build_engine(options, progress)
    assert load_manifest(engine).dtype == dtype
    with pipeline(engine, EngineConfig(threads=1)) as pipe:
        golden = Golden(folder, pipe)
        check_images(golden, TOLERANCES[dtype])
        for case in cases_of(folder):
            check_prompt(golden, case["id"])
            check_answer(golden, case["id"], TOLERANCES[dtype])
