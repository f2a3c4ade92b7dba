"""Bad input gives a typed error that says what was found, what was expected and what to do.

One table: builds of damaged checkpoints (nothing may be left behind), damaged engines, images and
prompts. Each row names the error's type and words that its text must have.
"""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import HF, IMAGES, ORIGINAL
from damage import (
    BINS,
    NORM,
    POINTER,
    SHARDS,
    Damage,
    edit_json,
    edit_tensor,
    evil_pickle,
    flip,
    huge_png,
    remove,
    shorten,
    write,
)
from vlmforge import ChatTemplateConfig, EngineConfig, GenerationConfig, Pipeline, pipeline
from vlmforge import errors as e
from vlmforge.vl.constants import IMAGE_TOKEN
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress

PHOTO = str(IMAGES / "gray_257x191.png")


@dataclass(frozen=True)
class Place:
    """Where a row works: its folder, and a pipeline that is whole."""

    tmp: Path
    engine: Path
    pipe: Pipeline

    def checkpoint(self, source: Path = HF) -> Path:
        folder = self.tmp / "checkpoint"
        shutil.copytree(source / "checkpoint", folder)
        return folder

    def build(self, checkpoint: Path | str, **options: Any) -> None:
        output = options.pop("output", self.tmp / "engine")
        with Progress(text=io.StringIO()) as progress:
            build_engine(BuildOptions(str(checkpoint), output, **options), progress)

    def copy(self) -> Path:
        folder = self.tmp / "copy.engine"
        shutil.copytree(self.engine, folder)
        return folder


Action = Callable[[Place], object]


def hf(damage: Damage, **options: Any) -> Action:
    """Build the layout of transformers, damaged."""

    def act(place: Place) -> None:
        checkpoint = place.checkpoint()
        damage(checkpoint)
        place.build(checkpoint, **{"session_len": 1024, **options})  # traced for others already

    return act


def original(damage: Damage, *, tower: bool = True, **options: Any) -> Action:
    """Build the original layout, damaged."""

    def act(place: Place) -> None:
        checkpoint = place.checkpoint(ORIGINAL)
        damage(checkpoint)
        if tower:
            options["vision_tower"] = str(ORIGINAL / "openai/clip-vit-large-patch14-336")
        place.build(checkpoint, **options)

    return act


def engine(damage: Damage, **config: Any) -> Action:
    """Open a damaged engine."""

    def act(place: Place) -> None:
        folder = place.copy()
        damage(folder)
        pipeline(folder, **config).close()

    return act


def ask(prompt: object, **options: Any) -> Action:
    return lambda place: place.pipe(prompt, **options)


def image(data: bytes) -> Action:
    """Ask about a file with these bytes."""

    def act(place: Place) -> object:
        path = place.tmp / "image.png"
        path.write_bytes(data)
        return place.pipe(("what is this?", str(path)))

    return act


def nothing(_: Path) -> None:
    return None


TABLE: list[tuple[str, Action, type[e.VlmforgeError], str]] = [
    # Checkpoints.
    ("no folder", lambda p: p.build(p.tmp / "nowhere"), e.CheckpointError, "nowhere"),
    ("no config.json", hf(remove("config.json")), e.CheckpointError, "config.json"),
    ("config not JSON", hf(write("config.json", b"{")), e.CheckpointError, "config.json"),
    ("config a list", hf(write("config.json", b"[]")), e.CheckpointError, "config.json"),
    (
        "unknown architecture",
        hf(edit_json("config.json", architectures=["GPT9"])),
        e.UnsupportedModelError,
        "GPT9",
    ),
    (
        "a key of a wrong type",
        hf(edit_json("config.json", **{"text_config.hidden_size": "big"})),
        e.CheckpointError,
        "text_config.hidden_size",
    ),
    (
        "scaled rotary positions",
        hf(edit_json("config.json", **{"text_config.rope_scaling": {"type": "yarn"}})),
        e.UnsupportedModelError,
        "yarn",
    ),
    (
        "attention bias",
        hf(edit_json("config.json", **{"text_config.attention_bias": True})),
        e.UnsupportedModelError,
        "attention_bias",
    ),
    (
        "another tower",
        hf(edit_json("config.json", **{"vision_config.model_type": "siglip"})),
        e.UnsupportedModelError,
        "siglip",
    ),
    ("missing shard", hf(remove(SHARDS[1])), e.CheckpointError, SHARDS[1]),
    ("no weights", hf(remove("model.safetensors.index.json", *SHARDS)), e.CheckpointError, "no"),
    ("truncated shard", hf(shorten(SHARDS[2])), e.CheckpointError, SHARDS[2]),
    ("header is garbage", hf(write(SHARDS[0], b"\xff" * 64)), e.CheckpointError, SHARDS[0]),
    ("empty shard", hf(write(SHARDS[0], b"")), e.CheckpointError, SHARDS[0]),
    ("a git-lfs pointer", hf(write(SHARDS[0], POINTER)), e.CheckpointError, "git lfs pull"),
    ("missing tensor", hf(edit_tensor(SHARDS[2], NORM, lambda t: None)), e.CheckpointError, NORM),
    (
        "wrong shape",
        hf(edit_tensor(SHARDS[2], NORM, lambda t: t[:-1])),
        e.TensorError,
        NORM,
    ),
    (
        "not a number",
        hf(edit_tensor(SHARDS[2], NORM, lambda t: t * np.float32("nan"))),
        e.TensorError,
        NORM,
    ),
    (
        "too big for float16",
        hf(edit_tensor(SHARDS[2], NORM, lambda t: t * np.float32(1e6)), dtype="float16"),
        e.TensorError,
        "float16",
    ),
    ("truncated .bin", original(shorten(BINS[0], 5000)), e.CheckpointError, BINS[0]),
    (
        "a pickle without a zip",
        original(write(BINS[0], pickle.dumps({"a": 1}))),
        e.CheckpointError,
        BINS[0],
    ),
    ("a pickle with code", original(evil_pickle), e.CheckpointError, BINS[0]),
    (
        "no tower",
        original(edit_json("config.json", mm_vision_tower="no/such-tower"), tower=False),
        e.CheckpointError,
        "--vision-tower",
    ),
    (
        "another projector",
        original(edit_json("config.json", mm_projector_type="linear")),
        e.UnsupportedModelError,
        "mm_projector_type",
    ),
    (
        "another aspect ratio",
        original(edit_json("config.json", image_aspect_ratio="anyres")),
        e.UnsupportedModelError,
        "anyres",
    ),
    (
        "no tokenizer",
        hf(remove("tokenizer.json", "tokenizer.model")),
        e.TokenizerError,
        "tokenizer.json",
    ),
    ("tokenizer.json cut", hf(shorten("tokenizer.json")), e.TokenizerError, "tokenizer.json"),
    (
        "tokenizer.model cut",
        original(shorten("tokenizer.model", 3001)),
        e.TokenizerError,
        "tokenizer.model",
    ),
    (
        "another image token",
        hf(edit_json("config.json", image_token_index=7)),
        e.CheckpointError,
        "image_token_index 7",
    ),
    ("no image processor", hf(remove("preprocessor_config.json")), e.CheckpointError, "preproc"),
    (
        "a crop that does not fit",
        hf(edit_json("preprocessor_config.json", crop_size=100)),
        e.CheckpointError,
        "crop_size",
    ),
    # Options of a build.
    ("unknown dtype", hf(nothing, dtype="int3"), e.ConfigError, "int3"),
    ("unknown target", hf(nothing, target="abacus"), e.ConfigError, "abacus"),
    ("no session", hf(nothing, session_len=0), e.ConfigError, "--session-len"),
    ("no batch", hf(nothing, max_batch_size=0), e.ConfigError, "--max-batch-size"),
    ("unknown template", hf(nothing, chat_template="poem"), e.ConfigError, "poem"),
    ("template not JSON", hf(nothing, chat_template="{"), e.ConfigError, "JSON"),
    (
        "output is a file",
        lambda p: p.build(p.checkpoint(), output=Path(__file__)),
        e.BuildError,
        "a file",
    ),
    (
        "output is a folder of others",
        lambda p: p.build(p.checkpoint(), output=IMAGES),
        e.BuildError,
        "left alone",
    ),
    # Engines.
    ("not an engine", engine(remove("engine.json")), e.BuildError, "engine.json"),
    ("manifest not JSON", engine(write("engine.json", b"{")), e.EngineFormatError, "JSON"),
    (
        "another schema",
        engine(edit_json("engine.json", schema_version=99)),
        e.EngineFormatError,
        "99",
    ),
    ("unknown key", engine(edit_json("engine.json", magic=1)), e.EngineFormatError, "magic"),
    ("missing key", engine(edit_json("engine.json", kv=...)), e.EngineFormatError, "'kv'"),
    (
        "key of a wrong type",
        engine(edit_json("engine.json", **{"kv.layers": True})),
        e.EngineFormatError,
        "kv.layers",
    ),
    (
        "unknown backend",
        engine(edit_json("engine.json", backend="abacus")),
        e.BackendUnavailableError,
        "abacus",
    ),
    *(
        (f"{what} {name}", engine(damage(name)), e.EngineIntegrityError, name)
        for what, damage in (("flipped byte in", flip), ("missing", remove))
        for name in (
            "vision.onnx",
            "vision.data",
            "decoder.rank0.onnx",
            "decoder.rank0.data",
            "tokenizer.json",
            "chat_template.jinja",
            "goldens/image.npz",
        )
    ),
    ("short file", engine(shorten("vision.data", 1)), e.EngineIntegrityError, "vision.data"),
    (
        "window too large for the memory",
        engine(nothing, backend_config=EngineConfig(session_len=10**12)),
        e.BackendUnavailableError,
        "EngineConfig(session_len=...) with a smaller window",
    ),
    (
        "tensor parallelism",
        lambda p: pipeline(p.engine, backend_config=EngineConfig(tp=2, devices=[4, 5])),
        e.ConfigError,
        "the first devices",
    ),
    (
        "unknown template at run time",
        engine(nothing, chat_template_config=ChatTemplateConfig("poem")),
        e.ConfigError,
        "poem",
    ),
    ("unknown argument", engine(nothing, colour="red"), e.ConfigError, "colour"),
    # Images.
    ("not an image", image(b"hello, I am a text"), e.ImageError, "image.png"),
    ("empty image", image(b""), e.ImageError, "image.png"),
    ("half an image", image(Path(PHOTO).read_bytes()[:9000]), e.ImageError, "image.png"),
    ("a huge image", image(huge_png()), e.ImageError, "50000"),
    ("no such image", ask(("what?", "no/such.png")), e.ImageError, "no/such.png"),
    ("a broken data URI", ask(("what?", "data:image/png;base64,????")), e.ImageError, "base64"),
    (
        "a private address",
        ask(("what?", "http://127.0.0.1:9/a.png")),
        e.ImageFetchError,
        "VLMFORGE_ALLOW_PRIVATE_URLS=1",
    ),
    # Prompts.
    ("a number", ask(7), e.PromptError, "int 7"),
    ("a triple", ask(("a", PHOTO, "b")), e.PromptError, "length 3"),
    ("too many tokens", ask((f"a{IMAGE_TOKEN}{IMAGE_TOKEN}", PHOTO)), e.PromptError, IMAGE_TOKEN),
    ("token without image", ask(f"a{IMAGE_TOKEN}"), e.PromptError, "0 images"),
    ("unknown role", ask([{"role": "judge", "content": "a"}]), e.PromptError, "judge"),
    (
        "unknown content",
        ask([{"role": "user", "content": [{"type": "smell"}]}]),
        e.PromptError,
        "smell",
    ),
    ("too long", ask("word " * 4000), e.ContextLengthError, "window"),
    ("a config too few", ask(["a", "b"], gen_config=[None]), e.ConfigError, "2"),
    ("an adapter", ask("a", adapter_name="lora"), e.ConfigError, "lora"),
    ("temperature 9", lambda p: GenerationConfig(temperature=9), e.ConfigError, "temperature"),
    ("too many answers", lambda p: GenerationConfig(n=129), e.ConfigError, "128"),
    (
        "no such token",
        ask("a", gen_config=GenerationConfig(stop_token_ids=[9**9])),
        e.ConfigError,
        "stop_token_ids",
    ),
]


@pytest.fixture(scope="module")
def whole(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine) as pipe:
        yield pipe


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 40
    assert len({row[0] for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize(
    ("action", "kind", "words"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_bad_input(
    action: Action,
    kind: type[e.VlmforgeError],
    words: str,
    tmp_path: Path,
    hf_engine: Path,
    whole: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # No hub: an id that is not a folder must fail at once, without a network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(kind) as caught:
        action(Place(tmp_path, hf_engine, whole))
    error = caught.value
    assert words in str(error)
    assert error.summary
    assert error.found
    assert error.expected
    assert error.fix
    # Nothing half-written, nothing run.
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"checkpoint", "copy.engine", "image.png"}


def test_the_pipeline_still_answers_after_all_of_it(whole: Pipeline) -> None:
    for _, action, kind, _ in TABLE:
        if kind in (e.PromptError, e.ContextLengthError):
            with pytest.raises(kind):
                action(Place(Path(), Path(), whole))
    response = whole("hi", gen_config=GenerationConfig(max_new_tokens=3))
    assert response.finish_reason in ("stop", "length")
