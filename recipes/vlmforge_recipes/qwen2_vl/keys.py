"""What a build does with each configuration key of the family, by model and layout."""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge_builder.checkpoint.keys import Key, KeyTable, honoured, refused
from vlmforge_recipes.config_keys import text_keys
from vlmforge_recipes.patch_keys import patch_tables

_ROPE: tuple[Key, ...] = (
    *honoured("rotary base; before the plain key", "rope_theta"),
    *refused("scaled rotary positions", "rope_type type", "default", "mrope"),
    *honoured("frequencies of each axis", "mrope_section"),
    *refused("axes in turn", "mrope_interleaved", False),
    *refused("part of the head's width is rotated", "partial_rotary_factor", 1.0),
)
_WINDOWS = honoured(
    "geometry", "hidden_size intermediate_size out_hidden_size window_size fullatt_block_indexes"
)
_PLAIN = honoured("geometry", "embed_dim mlp_ratio hidden_size")


def _tables(kind: str, place: str, vision: tuple[Key, ...]) -> tuple[KeyTable, ...]:
    section = refused("another decoder", "model_type", f"{kind}_text", kind) if place else ()
    text = KeyTable("config.json", place, (*section, *text_keys(f"{kind}_text")))
    return patch_tables(text=text, rope=_ROPE, vision=vision)


FULL = _tables("qwen2_vl", "", _PLAIN)
NESTED_FULL = _tables("qwen2_vl", "text_config", _PLAIN)
WINDOWED = _tables("qwen2_5_vl", "", _WINDOWS)
NESTED_WINDOWED = _tables("qwen2_5_vl", "text_config", _WINDOWS)

DOCUMENTED: Mapping[str, tuple[KeyTable, ...]] = {
    "Qwen2-VL": FULL,
    "Qwen2-VL of transformers 5": NESTED_FULL,
    "Qwen2.5-VL": WINDOWED,
    "Qwen2.5-VL of transformers 5": NESTED_WINDOWED,
}
"""By the layouts' names in docs/checkpoints.md."""
