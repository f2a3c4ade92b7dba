"""What a build does with each configuration key of the family (`VL/llava` of 01-ai/Yi)."""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge_builder.checkpoint.keys import KeyTable, honoured, refused, unused
from vlmforge_recipes.config_keys import (
    CODE,
    GENERATION,
    ROPE_KEYS,
    TOWER_TABLES,
    WRITTEN_TEMPLATE,
    text_keys,
    tokenizer_table,
)

_TOP = (
    *honoured("recognises the model", "architectures"),
    *unused("`architectures` and `mm_projector_type` tell it", "model_type"),
    *honoured("where the vision tower is", "mm_vision_tower"),
    *honoured("features of the tower", "mm_vision_select_layer mm_vision_select_feature"),
    *honoured("must be the tower's", "mm_hidden_size"),
    *honoured("kind; unknown ones are refused", "mm_projector_type"),
    *honoured("padding to a square, or the centre; others are refused", "image_aspect_ratio"),
    *refused("tokens around images", "mm_use_im_start_end mm_use_im_patch_token", False),
    *refused("views of an image", "image_grid_pinpoints"),
    *refused("another way from features to rows", "mm_resampler_type"),
    *refused("experts", "moe_layer"),
    *unused("of experts, of which there are none", "moe_mode"),
    *unused("the weights tell it", "use_mm_proj"),
    *honoured("whether the tower inside the checkpoint is used",
              "unfreeze_mm_vision_tower mm_tunable_parts"),
    *unused("of batches", "tokenizer_padding_side"),
    *unused("the original cuts nothing", "tokenizer_model_max_length"),
    *unused("of training only", "freeze_* tune_* *_lr"),
    *CODE,
)  # fmt: skip

TABLES: tuple[KeyTable, ...] = (
    KeyTable("config.json", "", (*_TOP, *text_keys("llama"))),
    *(KeyTable("config.json", place, ROPE_KEYS) for place in ("rope_parameters", "rope_scaling")),
    *TOWER_TABLES,
    GENERATION,
    tokenizer_table(WRITTEN_TEMPLATE, from_json=True),
    tokenizer_table(WRITTEN_TEMPLATE, from_json=False),
)
"""Of its one layout."""

DOCUMENTED: Mapping[str, tuple[KeyTable, ...]] = {"Yi-VL": TABLES}
"""By the layout's name in docs/checkpoints.md."""
