"""What `build-engine` is given: places to write and to read, and options that reach the engine."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from conftest import IMAGES
from hub_server import HubServer
from vlmforge import EngineConfig, GenerationConfig, Response, pipeline
from vlmforge.engine.bundle import open_bundle
from vlmforge.engine.manifest import Manifest, load_manifest
from vlmforge.errors import BuildError, CheckpointError, ConfigError, TensorError
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress
from vlmforge_builder.recipe import RecipeOptions
from vlmforge_recipes.llava.synthetic import PRESETS, write_checkpoint
from vlmforge_recipes.tower_folder import find_tower

TOWER = "openai/clip-vit-large-patch14-336"
TEMPLATE = {
    "model_name": "mine",
    "user": "Q: ",
    "eoh": " ",
    "assistant": "A:",
    "stop_words": ["##"],
}
SMALL = replace(
    PRESETS["tiny"],
    text=replace(PRESETS["tiny"].text, layers=1),
    vision=replace(PRESETS["tiny"].vision, layers=2, image_size=56),
)


def build(checkpoint: Path | str, engine: Path, **options: Any) -> Manifest:
    with Progress(text=io.StringIO()) as progress:
        build_engine(BuildOptions(str(checkpoint), engine, **options), progress)
    return load_manifest(engine)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint", SMALL)


@pytest.fixture(scope="module")
def exact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = tmp_path_factory.mktemp("exact") / "engine"
    build(checkpoint, engine)
    return engine


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = replace(SMALL, layout="original", file_format="bin")
    return write_checkpoint(tmp_path_factory.mktemp("original") / "checkpoint", spec)


# --- where to ---------------------------------------------------------------------------------


def test_a_foreign_folder_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").write_bytes(b"meow")
    for force in (False, True):
        with pytest.raises(BuildError) as caught:
            build(checkpoint, photos, force=force)
        assert f"{photos} exists and is not an engine; it was left alone." in str(caught.value)
        assert "a folder without engine.json" in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "cat.png"]
    assert (photos / "cat.png").read_bytes() == b"meow"


def test_a_foreign_file_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("mine", "utf-8")
    with pytest.raises(BuildError, match="exists and is not an engine; it was left alone"):
        build(checkpoint, note, force=True)
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BuildError, match="exists and is not an engine; it was left alone"):
        build(checkpoint, dangling)
    assert note.read_text("utf-8") == "mine"
    assert dangling.is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_below_a_file_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", "utf-8")
    with pytest.raises(BuildError, match="cannot be written to"):
        build(checkpoint, tmp_path / "file" / "sub" / "it.engine")


def test_an_empty_folder_and_missing_parents_are_fine(
    exact: Path, checkpoint: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "a" / "b" / "it.engine"
    engine.mkdir(parents=True)
    build(checkpoint, engine)
    names = {path.name for path in exact.iterdir()}
    assert {path.name for path in engine.iterdir()} == names
    assert [path.name for path in engine.parent.iterdir()] == ["it.engine"]


# --- options ----------------------------------------------------------------------------------


def answer(engine: Path) -> Response:
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True, output_logits="all")
    with pipeline(engine, EngineConfig(threads=1, session_len=256)) as pipe:
        made = pipe(("what is this", str(IMAGES / "photo_640x480.png")), gen_config=config)
    assert isinstance(made, Response)
    return made


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-2), ("bfloat16", 5e-2)])
def test_16_bit_engines(
    exact: Path, checkpoint: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    """The checkpoint's values are exact in both formats, so only the storage may differ."""
    manifest = build(checkpoint, tmp_path / "it.engine", dtype=dtype)
    assert (manifest.dtype, manifest.compute_dtype) == (dtype, "float32")
    assert {part.name for part in manifest.parts} == {"vision", "decoder"}
    for part, whole in zip(manifest.parts, load_manifest(exact).parts, strict=True):
        assert part.inputs == whole.inputs
    vision = manifest.part("vision"), load_manifest(exact).part("vision")
    assert vision[0].weight_bytes == pytest.approx(vision[1].weight_bytes / 2, rel=0.01)
    found, expected = answer(tmp_path / "it.engine"), answer(exact)
    assert found.logits is not None
    assert expected.logits is not None
    prompt = expected.input_token_len
    np.testing.assert_allclose(
        found.logits[:prompt], expected.logits[:prompt], atol=tolerance, rtol=0
    )
    assert found.token_ids == expected.token_ids


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.model.norm.weight"][3] = 7e4
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(TensorError, match="not finite") as caught:
        build(folder, tmp_path / "it.engine", dtype="float16")
    assert "norm.weight" in str(caught.value)
    assert "use --dtype float32 or bfloat16" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_limits_and_a_template_by_name_reach_the_manifest(checkpoint: Path, tmp_path: Path) -> None:
    manifest = build(
        checkpoint,
        tmp_path / "it.engine",
        session_len=333,
        max_batch_size=3,
        chat_template="vicuna",
    )
    assert (manifest.decode.session_len, manifest.decode.max_batch_size) == (333, 3)
    assert manifest.prompt.template_name == "vicuna"
    options = manifest.provenance.options
    assert (options["session_len"], options["max_batch_size"]) == ("333", "3")
    assert options["chat_template"] == "vicuna"
    with pipeline(tmp_path / "it.engine", EngineConfig(threads=1)) as pipe:
        text = pipe.render("hello").text
    assert text.startswith("A chat between a curious user and an artificial")
    assert text.endswith("USER: hello ASSISTANT:")


@pytest.mark.parametrize("given", ["text", "file"])
def test_a_template_as_json(checkpoint: Path, tmp_path: Path, given: str) -> None:
    path = tmp_path / "template.json"
    path.write_text(json.dumps(TEMPLATE), "utf-8")
    wanted = str(path) if given == "file" else json.dumps(TEMPLATE)
    engine = tmp_path / "it.engine"
    manifest = build(checkpoint, engine, chat_template=wanted)
    assert manifest.prompt.template_name == "mine"
    assert tuple(manifest.prompt.stop_words) == ("##",)
    path.unlink()  # it is frozen into the engine
    with pipeline(engine, EngineConfig(threads=1)) as pipe:
        assert pipe.render("hello").text == "Q: hello A:"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat_template": "nobody"}, "no chat template 'nobody'"),
        ({"chat_template": "nowhere.json"}, "nowhere.json"),
        ({"chat_template": '{"colour": 1}'}, "colour"),
        ({"session_len": 0}, "session_len is out of range"),
        ({"max_batch_size": -1}, "max_batch_size is out of range"),
        ({"session_len": 10**15}, "session_len is out of range"),
        ({"tower_weights": "mine"}, "--tower-weights mine"),
        ({"tower_weights": "stock"}, "no other can be chosen"),
        ({"dtype": "int3"}, "dtype is not known"),
        ({"target": "abacus"}, "Unknown target"),
    ],
    ids=str,
)
def test_options_that_cannot_be(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(checkpoint, tmp_path / "it.engine", **options)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        build(tmp_path / "nowhere", tmp_path / "it.engine")
    assert list(tmp_path.iterdir()) == []


# --- the vision tower of the original layout --------------------------------------------------


def no_hub(name: str) -> Path:
    raise CheckpointError(f"{name} could not be fetched.", found="no hub", expected="", fix="")


def test_places_of_the_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "models" / "org" / "checkpoint"
    checkpoint.mkdir(parents=True)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    options = RecipeOptions(None, None, no_hub)
    # From the last place that is looked at to the first: each must win over those before.
    places = [
        checkpoint.parent / "clip-vit-large-patch14-336",
        cwd / TOWER,
        tmp_path / "models" / TOWER,
        checkpoint.parent / TOWER,
        checkpoint / TOWER,
    ]
    with pytest.raises(CheckpointError) as caught:
        find_tower(checkpoint, TOWER, options)
    assert all(str(place) in str(caught.value) for place in places)
    assert f"build-engine {checkpoint} --vision-tower FOLDER_OR_HUB_ID" in str(caught.value)
    assert f"nor on the hub ({TOWER} could not be fetched.)" in str(caught.value)
    for place in places:
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}", "utf-8")
        assert find_tower(checkpoint, TOWER, options) == place


def test_a_tower_beside_and_a_tower_that_is_named(original: Path, tmp_path: Path) -> None:
    beside = build(original, tmp_path / "beside.engine")
    alone = tmp_path / "far" / "checkpoint"
    shutil.copytree(original, alone)
    tower = tmp_path / "tower"
    shutil.copytree(original.parent / TOWER, tower)
    named = build(alone, tmp_path / "named.engine", vision_tower=str(tower))
    assert named.provenance.options["vision_tower"] == "tower"
    assert named.provenance.source_fingerprint == beside.provenance.source_fingerprint
    shas = [
        {entry.path: entry.sha256 for entry in manifest.files if entry.path.endswith(".data")}
        for manifest in (beside, named)
    ]
    assert shas[0] == shas[1]
    assert len(shas[0]) == 2


# --- hub --------------------------------------------------------------------------------------


def command(arguments: Sequence[object], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "vlmforge_builder", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, **environment},
    )


@pytest.mark.usefixtures("traces_for_children")
def test_both_repositories_from_the_hub(original: Path, tmp_path: Path) -> None:
    """A checkpoint by its id; its tower, named in its config, from the hub too."""
    engine = tmp_path / "it.engine"
    with HubServer({"org/it": original, TOWER: original.parent / TOWER}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        done = command(["org/it", "-o", engine], **env)
        assert done.returncode == 0, done.stderr
    assert f"fetching org/it (main) from {hub.url}" in done.stderr
    assert f"fetching {TOWER} (main) from {hub.url}" in done.stderr
    manifest = open_bundle(engine).manifest
    assert manifest.provenance.source == "org/it"
    assert answer(engine).generate_token_len == 8
