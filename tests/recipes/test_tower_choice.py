"""Which vision tower is used where a checkpoint stores one and names another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import DATA
from vlmforge.errors import CheckpointError, ConfigError
from vlmforge_builder.checkpoint.store import open_store
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_builder.recognise import recognise
from vlmforge_builder.tensor_check import check_tensors

INSIDE = "model.vision_tower.vision_tower."
TOWERS = {
    "llava_v1_5_liuhaotian": "openai/clip-vit-large-patch14-336",
    "yi_vl": "checkpoint/vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl-6B-448",
}
PATCH = "vision_model.embeddings.patch_embedding.weight"
TUNED = "mm_vision_tower,mm_mlp_adapter,mm_language_model"


def no_hub(name: str) -> Path:
    raise CheckpointError(f"{name} could not be fetched.")


def load(
    checkpoint: Path, tower: str | None = None, weights: str | None = None
) -> tuple[Tensor, list[str]]:
    """The patch embedding of the tower that is used, and what was said of it."""
    notes: list[str] = []
    config, recipe = recognise(checkpoint)
    fetch = no_hub if tower is None else Path
    spec = recipe.load(checkpoint, config, RecipeOptions(None, tower, fetch, notes.append, weights))
    check_tensors(spec, notes.append)
    return patch_of(spec), notes


def patch_of(spec: ModelSpec) -> Tensor:
    weight = spec.parts[0].weights["tower.patch"]
    (name,) = weight.names
    return spec.store.read(name).float()


def made(tmp_path: Path, name: str, scale: float | None, **keys: object) -> Path:
    """The golden checkpoint, that stores the stock tower times `scale` (None: stores none)."""
    shutil.copytree(DATA / name, tmp_path / name)
    checkpoint = tmp_path / name / "checkpoint"
    own = open_store(checkpoint)
    tensors = {n: own.read(n).clone() for n in own.names() if not n.startswith(INSIDE)}
    if scale is not None:
        stock = stock_of(tmp_path, name)
        values = {n: t for n, t in stock.items() if t.is_floating_point()}
        tensors |= {INSIDE + n: (t * scale).bfloat16() for n, t in values.items()}
    for path in checkpoint.glob("pytorch_model*"):
        path.unlink()
    save_file({n: t.contiguous() for n, t in tensors.items()}, checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | keys), "utf-8")
    return checkpoint


def stock_of(tmp_path: Path, name: str) -> dict[str, Tensor]:
    store = open_store(tmp_path / name / TOWERS[name])
    return {n: store.read(n) for n in store.names() if n.startswith("vision_model.")}


def stock(tmp_path: Path, name: str) -> Tensor:
    return stock_of(tmp_path, name)[PATCH].float()


@pytest.fixture(params=TOWERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    "keys", [{"unfreeze_mm_vision_tower": True}, {"mm_tunable_parts": TUNED}], ids=str
)
def test_a_fine_tuned_tower(tmp_path: Path, name: str, keys: dict[str, object]) -> None:
    found, notes = load(made(tmp_path, name, 1.5, **keys))
    assert torch.equal(found, (stock(tmp_path, name) * 1.5).bfloat16().float())
    (note,) = [note for note in notes if "tower" in note]
    assert note.startswith(f"vision tower: that of the checkpoint ({next(iter(keys))}")
    assert str(tmp_path / name / TOWERS[name]).removesuffix("/") in note.replace("/./", "/")


@pytest.mark.parametrize(
    "keys", [{}, {"unfreeze_mm_vision_tower": False, "mm_tunable_parts": "mm_mlp_adapter"}], ids=str
)
def test_nothing_says_which(tmp_path: Path, name: str, keys: dict[str, object]) -> None:
    found, notes = load(made(tmp_path, name, 1.5, **keys))
    assert torch.equal(found, stock(tmp_path, name))
    (note,) = notes
    assert note.startswith("warning: vision tower: that of ")
    assert "--tower-weights checkpoint" in note
    assert INSIDE in note


def test_a_copy_of_the_stock_tower_is_no_choice(tmp_path: Path, name: str) -> None:
    """It was saved in a narrower dtype."""
    found, notes = load(made(tmp_path, name, 1.0))
    assert torch.equal(found, stock(tmp_path, name))
    assert notes == []


@pytest.mark.parametrize("keys", [{}, {"unfreeze_mm_vision_tower": True}], ids=str)
def test_the_option_decides(tmp_path: Path, name: str, keys: dict[str, object]) -> None:
    checkpoint = made(tmp_path, name, 1.5, **keys)
    inside, notes = load(checkpoint, weights="checkpoint")
    assert torch.equal(inside, (stock(tmp_path, name) * 1.5).bfloat16().float())
    assert [note.startswith("vision tower: that of the checkpoint") for note in notes] == [True]
    assert torch.equal(load(checkpoint, weights="stock")[0], stock(tmp_path, name))


@pytest.mark.parametrize(
    ("keys", "weights", "found"),
    [
        ({"unfreeze_mm_vision_tower": True}, None, "unfreeze_mm_vision_tower true"),
        ({"mm_tunable_parts": TUNED}, None, "mm_tunable_parts"),
        ({}, "checkpoint", "--tower-weights checkpoint"),
    ],
)
def test_a_tower_that_should_be_inside(
    tmp_path: Path, name: str, keys: dict[str, object], weights: str | None, found: str
) -> None:
    checkpoint = made(tmp_path, name, None, **keys)
    with pytest.raises(CheckpointError, match="stores no vision tower") as caught:
        load(checkpoint, weights=weights)
    assert found in caught.value.found
    assert "--tower-weights stock" in caught.value.fix
    assert torch.equal(load(checkpoint, weights="stock")[0], stock(tmp_path, name))


def test_two_towers_of_the_same_names(tmp_path: Path, name: str) -> None:
    checkpoint = made(tmp_path, name, None)
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {PATCH: stock(tmp_path, name)}, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="store tensors of the same names") as caught:
        load(checkpoint)
    assert PATCH in caught.value.found


@pytest.mark.parametrize("family", ["llava_1_5_hf", "llava_next_mistral_hf", "qwen_vl_chat"])
def test_layouts_without_a_choice(family: str) -> None:
    checkpoint = DATA / family / "checkpoint"
    for tower, weights in (("somewhere", None), (None, "stock"), (None, "checkpoint")):
        with pytest.raises(ConfigError, match="no other can be chosen"):
            load(checkpoint, tower, weights)


def test_a_folder_of_a_projector_alone(tmp_path: Path, name: str) -> None:
    """Found before its tower is looked for, which may have to be downloaded."""
    checkpoint = made(tmp_path, name, None, mm_vision_tower="no/where")
    (checkpoint / "model.safetensors").rename(checkpoint / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="has no weights") as caught:
        load(checkpoint)
    assert "mm_projector.bin" in caught.value.found
    assert "merge it into its own first" in caught.value.fix


def test_a_tower_in_two_places_is_no_silent_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = made(tmp_path, "llava_v1_5_liuhaotian", None)
    tower = TOWERS["llava_v1_5_liuhaotian"]
    beside = checkpoint.parent / tower
    monkeypatch.chdir(checkpoint.parent)
    assert load(checkpoint)[1] == []  # one folder by two ways
    monkeypatch.chdir(tmp_path)
    shutil.copytree(beside, tmp_path / tower)
    (note,) = load(checkpoint)[1]
    assert f"that of {beside};" in note
    assert str(tmp_path / tower) in note
    assert "--vision-tower" in note
    assert load(checkpoint, str(beside))[1] == []
