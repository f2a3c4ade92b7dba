"""What a build does with each configuration key of the family."""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge_builder.checkpoint.keys import Key, KeyTable, honoured, refused
from vlmforge_recipes.config_keys import text_keys
from vlmforge_recipes.patch_keys import patch_tables

_ROPE: tuple[Key, ...] = (
    *honoured("rotary base; before the plain key", "rope_theta"),
    *refused("scaled rotary positions", "rope_type type", "default"),
    *honoured("frequencies of each axis", "mrope_section"),
    *refused("axes one after the other", "mrope_interleaved", True),
    *refused("part of the head's width is rotated", "partial_rotary_factor", 1.0),
)
_TOWER = honoured(
    "geometry",
    "hidden_size intermediate_size out_hidden_size num_position_embeddings "
    "deepstack_visual_indexes",
)
_KIND = "qwen3_vl_text"

TABLES: tuple[KeyTable, ...] = patch_tables(
    text=KeyTable(
        "config.json",
        "text_config",
        (*refused("another decoder", "model_type", _KIND), *text_keys(_KIND)),
    ),
    rope=_ROPE,
    vision=_TOWER,
)
"""Of its one layout."""

DOCUMENTED: Mapping[str, tuple[KeyTable, ...]] = {"Qwen3-VL": TABLES}
"""By the layout's name in docs/checkpoints.md."""
