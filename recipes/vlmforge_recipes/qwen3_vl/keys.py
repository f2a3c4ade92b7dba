"""What a build does with each configuration key of the family."""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge_builder.checkpoint.config import ConfigReader
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


def _tables(*, old: bool) -> tuple[KeyTable, ...]:
    keys = (*refused("another decoder", "model_type", _KIND), *text_keys(_KIND))
    text = KeyTable("config.json", "text_config", keys)
    return patch_tables(text=text, old=old, rope=_ROPE, vision=_TOWER)


_PUBLISHED, _SAVED = _tables(old=True), _tables(old=False)


def tables_of(config: ConfigReader) -> tuple[KeyTable, ...]:
    """The keys of the checkpoint's files: as published, or as transformers 5 saves them."""
    text = config.section("text_config")
    return _PUBLISHED if text.has("rope_scaling") else _SAVED


DOCUMENTED: Mapping[str, tuple[KeyTable, ...]] = {
    "Qwen3-VL": _PUBLISHED,
    "Qwen3-VL of transformers 5": _SAVED,
}
"""By the layouts' names in docs/checkpoints.md."""
