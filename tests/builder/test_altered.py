"""Quantised weights and unmerged adapters are refused by JSON files alone, in every family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import DATA
from damage import edit_json
from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.checkpoint.altered import refuse_altered
from vlmforge_builder.recipe import RecipeOptions
from vlmforge_builder.recognise import recognise
from vlmforge_recipes.tower_folder import find_tower

FAMILIES = sorted(path.parents[1].name for path in DATA.glob("*/checkpoint/config.json"))
SECTIONS = {"text_config", "vision_config", "visual"}


def configs(folder: Path, name: str) -> Path:
    """The JSON files of a golden checkpoint, without its weights."""
    folder.mkdir(exist_ok=True)
    for path in (DATA / name / "checkpoint").glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    return folder


def refusal(folder: Path) -> UnsupportedModelError:
    with pytest.raises(UnsupportedModelError) as caught:
        recognise(folder)
    assert caught.value.summary == "The checkpoint's weights are quantised already."
    assert "--weights int8 or int4" in caught.value.fix
    return caught.value


@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_checkpoints_of_every_family(tmp_path: Path, name: str) -> None:
    settings = {"quant_method": "gptq", "bits": 4}
    sections = SECTIONS & set(json.loads((DATA / name / "checkpoint/config.json").read_text()))
    for section in ("", *sections):
        folder = configs(tmp_path, name)
        recognise(folder)
        dotted = f"{section}.quantization_config".lstrip(".")
        for nothing in (None, ...):
            edit_json("config.json", **{dotted: None})(folder)
            edit_json("config.json", **{dotted: nothing})(folder)
            recognise(folder)
        edit_json("config.json", **{dotted: settings})(folder)
        assert refusal(folder).found == f"gptq: {dotted} in {folder / 'config.json'}"


@pytest.mark.parametrize(
    ("settings", "method", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes", "dequantize()"),
        ({"load_in_4bit": True}, "bitsandbytes", "model.dequantize()"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", "dequantize=True"),
        ({"quant_method": "fp8"}, "fp8", "FineGrainedFP8Config(dequantize=True)"),
        ({"quant_method": "awq"}, "awq", "quantised from"),
        ({"quant_algo": "NVFP4"}, "NVFP4", "quantised from"),
        ({}, "an unknown method", "quantised from"),
        ("int8", "an unknown method", "quantised from"),
    ],
    ids=str,
)
def test_the_method_and_what_to_do(
    tmp_path: Path, settings: object, method: str, words: str
) -> None:
    folder = configs(tmp_path, FAMILIES[0])
    for key in ("quantization_config", "compression_config"):
        edit_json("config.json", quantization_config=None, compression_config=None)(folder)
        edit_json("config.json", **{key: settings})(folder)
        error = refusal(folder)
        assert error.found.startswith(f"{method}: {key}")
        assert words in error.fix


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
        ("hf_quant_config.json", "modelopt"),
    ],
)
def test_files_of_quantisers(tmp_path: Path, file: str, method: str) -> None:
    folder = configs(tmp_path, FAMILIES[0])
    (folder / file).write_text("{}", "utf-8")
    assert refusal(folder).found == f"{method}: {folder / file} says so"


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "files",
    [
        ("adapter_config.json",),
        ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"),
        ("adapter_model.bin",),
        ("non_lora_trainables.bin",),
    ],
    ids=str,
)
def test_adapters(tmp_path: Path, name: str, files: tuple[str, ...]) -> None:
    """Whole weights beside it do not make it harmless: `from_pretrained` would apply it."""
    folder = configs(tmp_path, name)
    for file in files:
        (folder / file).write_text(json.dumps(ADAPTER), "utf-8")
    with pytest.raises(CheckpointError) as caught:
        recognise(folder)
    error = caught.value
    assert error.summary == f"{folder} holds an adapter that is not merged into its model."
    told = "LORA of lmsys/vicuna-7b-v1.5" if "adapter_config.json" in files else "adapter of BASE"
    assert error.found == f"{told} ({', '.join(files)})"
    assert "merge it first" in error.fix
    assert "merge_and_unload()" in error.fix


def test_an_adapter_alone_has_no_config(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER), "utf-8")
    with pytest.raises(CheckpointError, match="an adapter that is not merged"):
        recognise(tmp_path)


def test_a_file_of_weights_of_another_name(tmp_path: Path) -> None:
    folder = configs(tmp_path, FAMILIES[0])
    edit_json("config.json", transformers_weights="other.safetensors")(folder)
    with pytest.raises(CheckpointError, match="names a file of weights of its own") as caught:
        refuse_altered(folder)
    assert caught.value.found == "transformers_weights 'other.safetensors'"


def test_a_quantised_tower_beside_the_checkpoint(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        find_tower(tmp_path, "tower", RecipeOptions(None, None, Path))
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        find_tower(tmp_path, "no", RecipeOptions(None, str(tmp_path / "tower"), Path))
