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


def _tables(kind: str, place: str, vision: tuple[Key, ...], *, old: bool) -> tuple[KeyTable, ...]:
    section = refused("another decoder", "model_type", f"{kind}_text", kind) if place else ()
    text = KeyTable("config.json", place, (*section, *text_keys(f"{kind}_text")))
    return patch_tables(text=text, old=old, rope=_ROPE, vision=vision)


FULL, WINDOWED = (
    {
        "": _tables(kind, "", vision, old=True),
        " of transformers 4.52": _tables(kind, "text_config", vision, old=True),
        " of transformers 5": _tables(kind, "text_config", vision, old=False),
    }
    for kind, vision in (("qwen2_vl", _PLAIN), ("qwen2_5_vl", _WINDOWS))
)
"""Of each model, by the end of the layout's name."""

DOCUMENTED: Mapping[str, tuple[KeyTable, ...]] = {
    **{f"Qwen2-VL{end}": tables for end, tables in FULL.items()},
    **{f"Qwen2.5-VL{end}": tables for end, tables in WINDOWED.items()},
}
"""By the layouts' names in docs/checkpoints.md."""
