"""What published checkpoints and transformers write into a configuration is no reason to refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
)

from configuration_keys import load, read, rows, section, write
from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.keys import KeyTable, check_keys
from vlmforge_recipes.config_keys import TOWER
from vlmforge_recipes.llava.keys import DOCUMENTED as LLAVA
from vlmforge_recipes.qwen_vl.keys import DOCUMENTED as QWEN_VL
from vlmforge_recipes.yi_vl.keys import DOCUMENTED as YI_VL

LAYOUTS = {**LLAVA, **QWEN_VL, **YI_VL}
ORIGINAL = "original LLaVA, Llama"
CONFIGS: dict[str, list[Any]] = {
    "LLaVA v1.5 of transformers, Llama": [LlavaConfig(), LlavaConfig(text_config=LlamaConfig())],
    "LLaVA v1.5 of transformers, Mistral": [LlavaConfig(text_config=MistralConfig())],
    "LLaVA v1.6 of transformers, Llama": [LlavaNextConfig()],
    "LLaVA v1.6 of transformers, Mistral": [LlavaNextConfig(text_config=MistralConfig())],
    ORIGINAL: [LlamaConfig()],
    "original LLaVA, Mistral": [MistralConfig()],
    "Yi-VL": [LlamaConfig()],
}


def _check(tables: tuple[KeyTable, ...], file: str, values: object, when: str = "") -> None:
    # JSON as it is written: 1e6 is a float, tuples are lists.
    check_keys(ConfigReader(json.loads(json.dumps(values)), Path(file)), tables, when)


@pytest.mark.parametrize("layout", CONFIGS)
def test_all_that_a_class_writes_by_default(layout: str) -> None:
    for config in CONFIGS[layout]:
        _check(LAYOUTS[layout], "config.json", config.to_dict())
        _check(LAYOUTS[layout], "config.json", config.to_diff_dict())


@pytest.mark.parametrize("config", [CLIPConfig(), CLIPVisionConfig()], ids=lambda c: c.model_type)
def test_all_that_a_tower_writes_by_default(config: Any) -> None:
    _check(LAYOUTS[ORIGINAL], "config.json", config.to_dict(), TOWER)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_that_a_generation_writes_by_default(layout: str) -> None:
    config = GenerationConfig.from_model_config(LlavaConfig())
    _check(LAYOUTS[layout], "generation_config.json", config.to_dict())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_flash_attn_2_enabled", True),  # transformers 4.34 and 4.35
        ("max_sequence_length", 2048),  # the first conversions of Llama
        ("unsloth_version", "2025.1.1"),
        ("unsloth_fixed", True),
    ],
)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "Qwen-VL-Chat"])
def test_notes_of_other_programs(layout: str, key: str, value: object) -> None:
    _check(LAYOUTS[layout], "config.json", {key: value})
    if "transformers" in layout:
        _check(LAYOUTS[layout], "config.json", {"text_config": {key: value}})


@pytest.mark.parametrize("layout", ["LLaVA v1.5 of transformers, Llama"])
@pytest.mark.parametrize("key", ["patch_size", "vision_feature_select_strategy"])
def test_a_processor_that_counts_nothing(tmp_path: Path, layout: str, key: str) -> None:
    """As 4.45 to 4.57 save one that was read from an older checkpoint: nulls, and 0 more tokens."""
    row = next(row for row in rows() if row.file == "processor_config.json")
    part = section(tmp_path / "c", row, layout)
    whole = read(part.path)
    before = part.plan()
    assert part.plan(num_additional_image_tokens=0, **{key: None}) == before
    write(part.path, {**whole, "num_additional_image_tokens": 0})
    with pytest.raises(CheckpointError, match="does not fit the vision tower"):
        load(part.checkpoint)


@pytest.mark.parametrize("layout", ["original LLaVA, Llama", "original LLaVA, Mistral"])
def test_what_the_training_script_of_llava_next_writes(layout: str) -> None:
    """Its `train.py` sets them on every configuration, those of videos by their defaults."""
    written = {
        "image_crop_resolution": 224,
        "image_split_resolution": 224,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 4096,
        "mm_newline_position": "grid",
        "add_faster_video": False,
        "faster_token_stride": 10,
        "add_time_instruction": False,
        "force_sample": False,
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_vision_tower_lr": 2e-6,
        "mm_projector_lr": None,
        "use_pos_skipping": False,
        "pos_skipping_range": 4096,
    }
    _check(LAYOUTS[layout], "config.json", written)
