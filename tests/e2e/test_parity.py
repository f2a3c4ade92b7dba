"""Parity with transformers, stage by stage, on checkpoints and prompts that are drawn here.

The goldens pin two checkpoints; these cross seeds, head groupings, tied tables, shards, tensor
names and file formats, with images and words of each checkpoint's own random stream.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from conftest import DATA
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from vlmforge.inputs.render import RenderedPrompt
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.stages import Engine
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress
from vlmforge_recipes.llava.synthetic import PRESETS, write_checkpoint

TINY = PRESETS["tiny"]
text = partial(replace, TINY.text)
SPECS = {
    "published": replace(TINY, seed=11),
    # Of the geometry of the last, which is traced once.
    "grouped_two_shards": replace(TINY, seed=12, text=text(rope_theta=5e5, kv_heads=2), shards=2),
    "tied_new_keys": replace(TINY, seed=13, text=text(tied=True), keys="new"),
    "grouped_tied_bin_shards": replace(
        TINY, seed=14, text=text(kv_heads=1, tied=True), file_format="bin", shards=2
    ),
    "new_keys_half_theta": replace(
        TINY, seed=15, text=text(rope_theta=5e5, kv_heads=2), keys="new", dtype="float16", shards=2
    ),
}
STEPS = 12
SESSION = 1024
WORDS = (
    *("red", "cat", "street", "3", "café", "画像", "the", "house", "under,", "blue?", "Tell"),
    *("me", "what", "is", "🐈", "not\nhere", "", "twice", "x1", "don't", "</s", "#!/bin"),
)
# Turns of a conversation by the images of each; every second turn is the assistant's.
SHAPES = ((1,), (0,), (1, 0, 0), (2, 0, 1))


def build(checkpoint: Path, engine: Path) -> Path:
    options = BuildOptions(
        str(checkpoint), engine, session_len=SESSION, max_batch_size=2, skip_goldens=True
    )
    with Progress(text=io.StringIO()) as progress:
        return build_engine(options, progress)


@dataclass(frozen=True)
class Turn:
    role: str
    words: str
    images: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Case:
    turns: tuple[Turn, ...]

    @property
    def images(self) -> list[Image.Image]:
        return [image for turn in self.turns for image in turn.images]

    def ours(self) -> list[dict[str, Any]]:
        def content(turn: Turn) -> list[dict[str, Any]]:
            pictures = [{"type": "image", "image": image} for image in turn.images]
            return [*pictures, {"type": "text", "text": turn.words}]

        return [{"role": turn.role, "content": content(turn)} for turn in self.turns]

    def theirs(self) -> list[dict[str, Any]]:
        def content(turn: Turn) -> list[dict[str, Any]]:
            return [*({"type": "image"} for _ in turn.images), {"type": "text", "text": turn.words}]

        return [{"role": turn.role, "content": content(turn)} for turn in self.turns]


def draw_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)

    def image() -> Image.Image:
        height, width = rng.integers(20, 420, 2)
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))

    def turn(index: int, images: int) -> Turn:
        words = " ".join(rng.choice(WORDS, rng.integers(1, 14)))
        pictures = tuple(image() for _ in range(images))
        return Turn("assistant" if index % 2 else "user", words, pictures)

    return [Case(tuple(turn(i, n) for i, n in enumerate(shape))) for shape in SHAPES]


@dataclass(frozen=True)
class Reference:
    """transformers' side, in float32 with its plain attention and its PIL image processor."""

    model: Any
    processor: Any

    def prompt(self, case: Case) -> str:
        made = self.processor.apply_chat_template(case.theirs(), add_generation_prompt=True)
        return cast(str, made)

    def inputs(self, case: Case) -> dict[str, torch.Tensor]:
        images = case.images or None
        return dict(self.processor(images=images, text=self.prompt(case), return_tensors="pt"))

    def logits(self, case: Case) -> np.ndarray[Any, np.dtype[np.float32]]:
        with torch.no_grad():
            found: np.ndarray[Any, np.dtype[np.float32]]
            found = self.model(**self.inputs(case)).logits[0].numpy()
        return found

    def greedy(self, case: Case) -> tuple[list[int], np.ndarray[Any, np.dtype[np.float32]]]:
        """The tokens, and the logits that chose each."""
        inputs = self.inputs(case)
        made = self.model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return ids, torch.cat(made.logits).numpy()


@dataclass(frozen=True)
class Pair:
    tied: bool
    reference: Reference
    pipe: Pipeline
    cases: Sequence[Case]

    @property
    def engine(self) -> Engine:
        return self.pipe._engine

    def answer(self, case: Case, config: GenerationConfig) -> Response:
        answer = self.pipe(case.ours(), gen_config=config)
        assert isinstance(answer, Response)
        return answer


def write_anyres(folder: Path, text_config: dict[str, Any], seed: int) -> Path:
    """A v1.6 checkpoint as transformers 5 saves it: its names of tensors and its config.json."""
    golden = DATA / "llava_next_mistral_hf" / "checkpoint"
    config = json.loads((golden / "config.json").read_text("utf-8"))
    config["text_config"] = text_config
    pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    config["image_grid_pinpoints"] = pinpoints
    config["vision_config"] |= {"image_size": 56}
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**config))
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1:
            torch.nn.init.normal_(
                tensor, std=(0.3 if "embed" in name else tensor[0].numel() ** -0.5)
            )
        elif "newline" in name:
            torch.nn.init.normal_(tensor)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.save_pretrained(folder)
    for path in golden.glob("*token*"):
        shutil.copy(path, folder / path.name)
    shutil.copy(golden / "chat_template.json", folder / "chat_template.json")
    processor = json.loads((golden / "preprocessor_config.json").read_text("utf-8"))
    processor |= {"image_grid_pinpoints": pinpoints, "size": {"shortest_edge": 56}}
    processor |= {"crop_size": {"height": 56, "width": 56}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), "utf-8")
    shutil.copy(golden / "processor_config.json", folder / "processor_config.json")
    return folder


MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 704,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": None,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
}
LLAMA = {key: value for key, value in MISTRAL.items() if key != "sliding_window"} | {
    "model_type": "llama",
    "num_key_value_heads": 4,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
}
ANYRES = {"anyres_mistral": (MISTRAL, 16), "anyres_llama": (LLAMA, 17)}


def write(name: str, folder: Path) -> tuple[Path, int, bool]:
    """The checkpoint, the seed of its cases, and whether its tables are tied."""
    if name in ANYRES:
        config, seed = ANYRES[name]
        return write_anyres(folder, config, seed), seed, False
    spec = SPECS[name]
    return write_checkpoint(folder, spec), spec.seed, spec.text.tied


# As published, it is one of the golden checkpoints.
DRAWN = [
    pytest.param(name, marks=pytest.mark.nightly if name == "published" else ())
    for name in (*SPECS, *ANYRES)
]


@pytest.fixture(scope="module", params=DRAWN)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint, seed, tied = write(request.param, folder / "checkpoint")
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None  # every prompt gives all its tokens
    processor = cast(Any, AutoProcessor).from_pretrained(checkpoint, backend="pil")
    engine = build(checkpoint, folder / "engine")
    with pipeline(engine, EngineConfig(threads=1)) as pipe:
        yield Pair(tied, Reference(model, processor), pipe, draw_cases(seed))


def test_both_sides_tie_the_tables_or_neither(pair: Pair) -> None:
    model = pair.reference.model
    table = model.model.language_model.embed_tokens.weight
    assert (model.lm_head.weight.data_ptr() == table.data_ptr()) == pair.tied


def test_prompt_text_and_token_ids(pair: Pair) -> None:
    for case in pair.cases:
        rendered = pair.pipe.render(case.ours())
        assert rendered.text == pair.reference.prompt(case)
        assert list(rendered.token_ids) == pair.reference.inputs(case)["input_ids"][0].tolist()
        assert len(rendered.image_spans) == len(case.images)


def test_pixels_and_features(pair: Pair) -> None:
    for case in pair.cases:
        if not case.images:
            continue
        inputs = pair.reference.inputs(case)
        pixels, sizes = inputs["pixel_values"], inputs.get("image_sizes")
        prepared = [pair.engine.prepare_image(image) for image in case.images]
        for ours, theirs in zip(prepared, pixels.numpy(), strict=True):
            # Views of several images are filled up with zeros.
            theirs = theirs.reshape(-1, *ours.pixel_values.shape[1:])[: len(ours.pixel_values)]
            np.testing.assert_allclose(ours.pixel_values, theirs, atol=1e-5, rtol=0)
        given = {"pixel_values": pixels} | ({} if sizes is None else {"image_sizes": sizes})
        with torch.no_grad():
            made = pair.reference.model.model.get_image_features(**given)
        features, _ = FeatureCache(pair.engine.encode, batch=3).get(prepared)
        for found, expected in zip(features, made.pooler_output, strict=True):
            np.testing.assert_allclose(found, expected.numpy(), atol=2e-3, rtol=0)


def test_logits_of_the_whole_prompt(pair: Pair) -> None:
    config = GenerationConfig(max_new_tokens=1, output_logits="all")
    for case in pair.cases:
        ours, expected = pair.answer(case, config).logits, pair.reference.logits(case)
        assert ours is not None
        assert expected.std() > 1  # a flat output would prove nothing
        np.testing.assert_allclose(ours, expected, atol=5e-3, rtol=0)


def test_greedy_tokens_and_the_logits_of_each_step(pair: Pair) -> None:
    config = GenerationConfig(max_new_tokens=STEPS, ignore_eos=True, output_logits="generation")
    compared = 0
    for case in pair.cases:
        expected, logits = pair.reference.greedy(case)
        answer = pair.answer(case, config)
        best = np.sort(logits, axis=-1)
        close = np.flatnonzero(best[:, -1] - best[:, -2] < 1e-3)
        decided = int(close[0]) if len(close) else STEPS
        assert len(answer.token_ids) == STEPS
        assert answer.token_ids[:decided] == expected[:decided]
        assert answer.logits is not None
        steps = min(decided + 1, STEPS)
        np.testing.assert_allclose(answer.logits[:steps], logits[:steps], atol=5e-3, rtol=0)
        compared += decided
    assert compared > STEPS * len(pair.cases) // 2


def test_loss_of_the_prompt(pair: Pair) -> None:
    config = GenerationConfig(max_new_tokens=1, return_ppl=True)
    for case in pair.cases:
        ids = pair.reference.inputs(case)["input_ids"][0]
        labels = torch.where(ids == pair.reference.model.config.image_token_index, -100, ids)
        logits = torch.from_numpy(pair.reference.logits(case))
        expected = torch.nn.functional.cross_entropy(logits[:-1], labels[1:])
        assert pair.answer(case, config).ppl == pytest.approx(expected.item(), abs=1e-3)


def test_both_layouts_of_the_same_weights_agree(tmp_path: Path) -> None:
    spec = replace(TINY, seed=22, text=text(kv_heads=1, tied=True))
    case = draw_cases(spec.seed)[-1]
    with pipeline(
        build(write_checkpoint(tmp_path / "hf", spec), tmp_path / "hf.engine"),
        EngineConfig(threads=1),
    ) as pipe:
        rendered = pipe.render(case.ours())
        pixels = [pipe._engine.prepare_image(image).pixel_values for image in case.images]
        expected = run(pipe._engine, rendered, case, pixels)
    original = replace(spec, layout="original", file_format="bin", shards=2)
    checkpoint = write_checkpoint(tmp_path / "original", original)
    with pipeline(build(checkpoint, tmp_path / "it.engine"), EngineConfig(threads=1)) as pipe:
        found = run(pipe._engine, rendered, case, pixels)
    assert expected.std() > 1
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def run(
    engine: Engine, rendered: RenderedPrompt, case: Case, pixels: Sequence[Any]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of every position, from these ids and pixel values."""
    features = [engine.vision.encode(values) for values in pixels]
    features = [values.reshape(-1, values.shape[-1]) for values in features]
    return engine.prefill((0,), engine.decoder_input(rendered, features), 0, logits="all")
