"""The traps of LLaVA v1.6: its tower, template, end and window, and what its files may say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import drawn_v1_6
from conftest import DATA
from vlmforge.engine.images.anyres import AnyRes
from vlmforge.engine.images.tiling import Lines, Merge, UnpaddedLines, Views
from vlmforge.errors import CheckpointError, UnsupportedModelError, VlmforgeError
from vlmforge_builder.checkpoint.config import read_config
from vlmforge_builder.recipe import ModelSpec, RecipeOptions, find_recipe

ORIGINAL = DATA / "llava_v1_6_mistral_liuhaotian"
HF = DATA / "llava_next_mistral_hf" / "checkpoint"


def no_hub(name: str) -> Path:
    raise CheckpointError(f"{name} could not be fetched.", found="no hub", expected="", fix="")


def load(checkpoint: Path, session_len: int | None = None) -> ModelSpec:
    config = read_config(checkpoint / "config.json")
    options = RecipeOptions(session_len, None, no_hub)
    return find_recipe(config).load(checkpoint, config, options)


def change(path: Path, **values: object) -> None:
    config = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "ABSENT"}), "utf-8")


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The golden checkpoint again, to be changed, in a folder whose name says nothing."""
    shutil.copytree(ORIGINAL, tmp_path / "yi-qwen")
    return tmp_path / "yi-qwen" / "checkpoint"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HF, tmp_path / "anything"))


# --- what is read from where -------------------------------------------------------------------


def test_templates_and_ends(tmp_path: Path) -> None:
    vicuna = load(drawn_v1_6.write(tmp_path / "a", drawn_v1_6.VICUNA))
    chatml = load(drawn_v1_6.write(tmp_path / "b", drawn_v1_6.CHATML))
    mistral = load(ORIGINAL / "checkpoint")
    names = [spec.template.name for spec in (vicuna, chatml, mistral)]
    assert names == ["llava-v1", "llava-chatml", "mistral_instruct"]
    assert [spec.eos_ids for spec in (vicuna, chatml, mistral)] == [(2,), (4,), (2,)]
    assert [spec.prompt.bos_id for spec in (vicuna, chatml, mistral)] == [1, None, 1]


def test_an_end_id_of_the_configuration_wins_over_the_tokenizer(original: Path) -> None:
    (original / "generation_config.json").unlink()
    change(original / "config.json", eos_token_id=[7, 2, 7])
    assert load(original).eos_ids == (7, 2)
    change(original / "config.json", eos_token_id="ABSENT")
    assert load(original).eos_ids == (2,)
    change(original / "config.json", eos_token_id="</s>")
    with pytest.raises(CheckpointError, match="wrong eos_token_id"):
        load(original)


def test_the_fine_tuned_tower_inside_is_used(tmp_path: Path) -> None:
    """The stock tower beside it has other weights; without the flag the original takes that."""
    checkpoint = drawn_v1_6.write(tmp_path, drawn_v1_6.VICUNA)

    def tower(spec: ModelSpec) -> torch.Tensor:
        part = next(part for part in spec.parts if part.name == "vision")
        return part.weights["tower.class_token"].read(spec.store, (32,))

    name = "embeddings.class_embedding"
    shards = [load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))]
    inside = next(s[k] for s in shards for k in s if k.endswith(f"vision_model.{name}"))
    stock = load_file(tmp_path / drawn_v1_6.TOWER / "model.safetensors")[f"vision_model.{name}"]
    assert not torch.equal(inside, stock)
    assert torch.equal(tower(load(checkpoint)), inside)
    change(checkpoint / "config.json", unfreeze_mm_vision_tower=False)
    assert torch.equal(tower(load(checkpoint)), stock)


def test_the_window_is_what_the_original_cuts_prompts_to(original: Path) -> None:
    spec = load(original)
    assert (spec.session_len, spec.trained_len) == (4096, 4096)
    assert load(original, 9000).session_len == 9000
    change(original / "config.json", tokenizer_model_max_length="ABSENT")
    assert load(original).session_len == 32768


def test_tokens_of_an_image(original: Path) -> None:
    spec = load(original)
    assert isinstance(spec.image, AnyRes)
    assert spec.tokens_per_image == len(spec.image.rows((672, 672))) == 2928
    # The published files of v1.6 have the list, older ones its text.
    text = str([[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])
    change(original / "config.json", image_grid_pinpoints=text)
    assert load(original).image == spec.image
    change(original / "config.json", image_grid_pinpoints=[[672, 336]])
    changed = load(original).image
    assert isinstance(changed, AnyRes)
    assert changed.tiling.canvases == ((672, 336),)


def test_pinpoints_of_transformers_are_height_first(hf: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        change(hf / name, image_grid_pinpoints=[[168, 336], [504, 168]])
    image = load(hf).image
    assert isinstance(image, AnyRes)
    tiling = image.tiling
    assert tiling.canvases == ((336, 168), (168, 504))
    assert (tiling.tile, tiling.side, tiling.merge) == (168, 12, UnpaddedLines(digits=7))


def test_a_template_is_found_where_a_checkpoint_has_none(hf: Path) -> None:
    assert load(hf).template.name == "checkpoint"
    (hf / "chat_template.json").unlink()
    assert load(hf).template.name == "mistral_instruct"


# --- merges ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "merge", "rows"),
    [("spatial_unpad", UnpaddedLines(), 577), ("spatial", Lines(), 576), ("ABSENT", Views(), 576)],
)
def test_ways_to_merge_views(original: Path, value: str, merge: Merge, rows: int) -> None:
    change(original / "config.json", mm_patch_merge_type=value)
    spec = load(original)
    assert isinstance(spec.image, AnyRes)
    assert (spec.image.tiling.merge, spec.image.tiling.view_rows) == (merge, rows)
    vision = next(part for part in spec.parts if part.name == "vision")
    assert ("extra_row" in vision.weights) == isinstance(merge, UnpaddedLines)


# --- what is refused ---------------------------------------------------------------------------

WRONG_CONFIGS = {
    "no pinpoints": ({"image_grid_pinpoints": "ABSENT"}, "without image_grid_pinpoints"),
    "other merge": ({"mm_patch_merge_type": "spatial_pad"}, "'spatial_pad'"),
    "text that is no list": ({"image_grid_pinpoints": "(1x1)"}, "'(1x1)'"),
    "numbers": ({"image_grid_pinpoints": [336, 672]}, "[336, 672]"),
    "empty": ({"image_grid_pinpoints": []}, "[]"),
    "nothing across": ({"image_grid_pinpoints": [[0, 336]]}, "[[0, 336]]"),
    "fractions of a tile": ({"image_grid_pinpoints": [[336, 500]]}, "[[336, 500]]"),
    "class tokens": ({"mm_vision_select_feature": "cls_patch"}, "class tokens"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_configurations_that_cannot_be(original: Path, case: str) -> None:
    values, found = WRONG_CONFIGS[case]
    change(original / "config.json", **values)
    with pytest.raises(VlmforgeError) as caught:
        load(original)
    assert isinstance(caught.value, CheckpointError | UnsupportedModelError)
    assert found in caught.value.found
    assert "config.json" in str(caught.value)


def test_a_processor_that_counts_by_other_pinpoints(hf: Path) -> None:
    change(hf / "preprocessor_config.json", image_grid_pinpoints=[[168, 168]])
    with pytest.raises(CheckpointError, match="other image_grid_pinpoints") as caught:
        load(hf)
    assert "((168, 168),)" in caught.value.found


def test_a_processor_of_another_size(hf: Path) -> None:
    change(hf / "preprocessor_config.json", size={"shortest_edge": 336})
    with pytest.raises(CheckpointError, match="does not fit the vision tower") as caught:
        load(hf)
    assert caught.value.found == "size 336"


def test_a_sliding_window_is_a_limit(original: Path) -> None:
    change(original / "config.json", sliding_window=2048)
    assert load(original).session_len == 2048
    with pytest.raises(UnsupportedModelError) as caught:
        load(original, 4096)
    assert caught.value.found == "sliding_window 2048 and a session_len of 4096"


def test_a_newline_that_is_missing(original: Path) -> None:
    for path in original.glob("*.safetensors"):
        tensors = load_file(path)
        if tensors.pop("model.image_newline", None) is not None:
            save_file(tensors, path)
    index = original / "model.safetensors.index.json"
    weights = json.loads(index.read_text("utf-8"))
    del weights["weight_map"]["model.image_newline"]
    index.write_text(json.dumps(weights), "utf-8")
    spec = load(original)
    part = next(part for part in spec.parts if part.name == "vision")
    with pytest.raises(VlmforgeError, match=r"model\.image_newline"):
        part.weights["extra_row"].read(spec.store, (64,))
