"""The traps of Yi-VL: who recognises it, which tower it has, how images and stops are handled."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import DATA, IMAGES, golden_engine
from vlmforge import EngineConfig, GenerationConfig, Response, pipeline
from vlmforge.engine.manifest import load_manifest
from vlmforge.errors import CheckpointError, ConfigError, UnsupportedModelError
from vlmforge.outputs import token_generator as generate_module
from vlmforge.vl import load_image
from vlmforge.vl.preprocess import preprocess
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.image_policy import choose_image_policy
from vlmforge_builder.progress import Progress
from vlmforge_builder.recipe import ModelSpec, RecipeOptions, find_recipe, installed_recipes

GOLDEN = DATA / "yi_vl"
CHECKPOINT = GOLDEN / "checkpoint"
TOWER = "vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl-6B-448"


def no_hub(name: str) -> Path:
    raise CheckpointError(f"{name} could not be fetched.", found="no hub", expected="", fix="")


def load(checkpoint: Path, tower: str | None = None) -> ModelSpec:
    config = read_config(checkpoint / "config.json")
    fetch = no_hub if tower is None else Path
    return find_recipe(config).load(checkpoint, config, RecipeOptions(None, tower, fetch))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The checkpoint again, to be changed, in a folder whose name says nothing."""
    folder = tmp_path / "models" / "my-llava-qwen-finetune"
    shutil.copytree(CHECKPOINT, folder)
    return folder


def change(checkpoint: Path, **values: object) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps(config), "utf-8")


# --- who recognises it -------------------------------------------------------------------------

ORIGINAL = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
TOWERS = {"mm_vision_tower": "some/tower"}


@pytest.mark.parametrize(
    ("values", "family"),
    [
        ({**ORIGINAL, **TOWERS, "mm_projector_type": "mlp2x_gelu_Norm"}, "yi_vl"),
        ({**ORIGINAL, **TOWERS, "mm_projector_type": "mlp2x_gelu"}, "llava"),
        ({**ORIGINAL, "mm_projector_type": "mlp2x_gelu_Norm"}, None),
        ({**ORIGINAL, "mm_projector_type": "mlp2x_gelu"}, None),
        ({**TOWERS, "mm_projector_type": "mlp2x_gelu_Norm", "model_type": "llava"}, None),
        ({"architectures": "LlavaLlamaForCausalLM", **TOWERS}, None),
    ],
    ids=str,
)
def test_one_recipe_at_most_matches(values: Mapping[str, object], family: str | None) -> None:
    config = ConfigReader(values, Path("yi-vl/llava/config.json"))
    matching = [recipe.name for recipe in installed_recipes() if recipe.matches(config)]
    assert matching == ([] if family is None else [family])


def test_every_golden_checkpoint_has_one_recipe() -> None:
    for path in sorted(DATA.glob("*/checkpoint/config.json")):
        matching = [r.name for r in installed_recipes() if r.matches(read_config(path))]
        assert len(matching) == 1, path


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"mm_projector_type": "mlp3x_gelu_Norm"}, "mm_projector_type 'mlp3x_gelu_Norm'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature 'cls'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end true"),
    ],
)
def test_variants_that_were_never_published(
    copy: Path, values: dict[str, object], found: str
) -> None:
    change(copy, **values)
    with pytest.raises(UnsupportedModelError) as caught:
        find_recipe(read_config(copy / "config.json"))
    assert found in caught.value.found


# --- the tower ---------------------------------------------------------------------------------


def read_vision(spec: ModelSpec) -> dict[str, torch.Tensor]:
    part = next(part for part in spec.parts if part.name == "vision")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in part.module().named_parameters()}
    return {name: part.weights[name].read(spec.store, shape) for name, shape in shapes.items()}


def test_the_towers_copy_in_the_shards_is_ignored(copy: Path) -> None:
    expected = read_vision(load(CHECKPOINT))
    altered = 0
    for path in copy.glob("pytorch_model-*.bin"):
        tensors = torch.load(path, weights_only=True)
        for name, tensor in tensors.items():
            if "vision_tower" in name:
                tensor.zero_()
                altered += 1
        torch.save(tensors, path)
    assert altered > 20
    found = read_vision(load(copy))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(name.startswith("projector.norm2") for name in found)


def test_where_the_tower_is(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name in the config is relative to the checkpoint
    spec = load(copy)
    assert [path.resolve() for path in spec.source_files] == [copy / TOWER]
    change(copy, mm_vision_tower=f"/where/it/was/trained/{TOWER}")
    assert load(copy).source_files == (copy / TOWER,)
    change(copy, mm_vision_tower=f"./{TOWER}")
    elsewhere = tmp_path / "tower"
    (copy / TOWER).rename(elsewhere)
    with pytest.raises(CheckpointError, match=r"The vision tower '\./vit/"):
        load(copy)
    assert load(copy, str(elsewhere)).source_files == (elsewhere,)


def test_the_projector_is_the_originals() -> None:
    """Linear, LayerNorm, GELU (erf), Linear, LayerNorm, written on torch's own layers."""
    spec = load(CHECKPOINT)
    store = spec.store
    linear = [torch.nn.Linear(80, 128), torch.nn.Linear(128, 128)]
    norms = [torch.nn.LayerNorm(128), torch.nn.LayerNorm(128)]
    for index, layer in zip((0, 3, 1, 4), (*linear, *norms), strict=True):
        for kind in ("weight", "bias"):
            values = store.read(f"model.mm_projector.{index}.{kind}").float()
            getattr(layer, kind).data.copy_(values)
    encoder = next(part for part in spec.parts if part.name == "vision").module()
    for name, parameter in encoder.named_parameters():
        if name.startswith("projector."):
            weight = next(part for part in spec.parts if part.name == "vision").weights[name]
            parameter.data.copy_(weight.read(store, tuple(parameter.shape)).float())
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(3))
    stack = torch.nn.Sequential(linear[0], norms[0], torch.nn.GELU(), linear[1], norms[1])
    with torch.no_grad():
        torch.testing.assert_close(encoder.projector(x), stack(x), atol=1e-5, rtol=0)


# --- images ------------------------------------------------------------------------------------


def test_the_other_official_preprocessing() -> None:
    golden = np.load(GOLDEN / "image_photo_640x480.npz")
    step = int(golden["row_step"])
    image = load_image(IMAGES / "photo_640x480.png")
    spec = load(CHECKPOINT)
    assert (spec.image.name, [p.name for p in spec.other_images]) == (
        "pad_square",
        ["center_crop"],
    )
    for name, key in (("pad_square", "pixel_values"), ("center_crop", "pixel_values_cli_nopad")):
        chosen = choose_image_policy(spec, name)
        found = preprocess(image, chosen.image)[0, :, ::step]
        np.testing.assert_allclose(found, golden[key], atol=1e-5, rtol=0)
    gap = np.abs(golden["pixel_values"] - golden["pixel_values_cli_nopad"]).max()
    assert gap > 1  # the two differ, or nothing was shown
    assert choose_image_policy(spec, None) is spec


def test_the_default_follows_the_config(copy: Path) -> None:
    change(copy, image_aspect_ratio="square")
    spec = load(copy)
    assert (spec.image.name, [p.name for p in spec.other_images]) == (
        "center_crop",
        ["pad_square"],
    )


def test_a_preprocessing_that_no_one_has() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_image_policy(load(CHECKPOINT), "anyres")
    assert caught.value.found == "'anyres'"
    assert caught.value.expected == "one of: pad_square, center_crop"


def test_the_choice_is_frozen_into_the_engine(tmp_path: Path) -> None:
    options = BuildOptions(str(CHECKPOINT), tmp_path / "it.engine", image_policy="center_crop")
    with Progress(text=io.StringIO()) as progress:
        build_engine(options, progress)
    manifest = load_manifest(tmp_path / "it.engine")
    assert manifest.image.name == "center_crop"
    assert manifest.provenance.options["image_policy"] == "center_crop"


# --- the end of an answer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["Hello", "###", " Human"], "Hello"),
        (["Hello", "#", "##", " Human"], "Hello"),  # across tokens
        (["Hello", "##", "\n", "#", "#", "#"], "Hello##\n"),
    ],
)
def test_three_hashes_end_an_answer(
    shared: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[str], text: str
) -> None:
    """Whatever tokens they come in, though no token id ends it."""
    with pipeline(golden_engine(shared, "yi_vl"), EngineConfig(threads=1)) as pipe:
        encode = pipe._engine.tokenizer.encode
        script = [token for piece in pieces for token in encode(piece)]
        tokens = iter([*script, *[script[0]] * 50])

        def step(_: object, logits: object) -> SimpleNamespace:
            return SimpleNamespace(id=next(tokens), top_logprobs=None)

        monkeypatch.setattr(generate_module.Sampler, "step", step)
        config = GenerationConfig(max_new_tokens=30, stop_words=["never said"])
        response = pipe("hi", gen_config=config)
    assert isinstance(response, Response)
    assert (response.text, response.finish_reason) == (text, "stop")


def test_facts_of_the_engine(shared: Path) -> None:
    manifest = load_manifest(golden_engine(shared, "yi_vl"))
    assert manifest.decode.tokens_per_image == 1024
    assert manifest.decode.eos_ids == (2,)
    assert manifest.decode.session_len == 4096
    prompt = manifest.prompt
    assert (prompt.bos_id, prompt.image_placeholder) == (None, "<image_placeholder>")
    assert (prompt.template_name, prompt.stop_words) == ("mm_default", ("###",))
    assert (manifest.kv.kv_heads, manifest.kv.head_dim) == (1, 32)
