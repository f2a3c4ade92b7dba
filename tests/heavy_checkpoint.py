"""A checkpoint whose weights outweigh what else a build or a plan holds; traced once for a run."""

from __future__ import annotations

from dataclasses import replace

from vlmforge_recipes.llava.synthetic import PRESETS

_TINY = PRESETS["tiny"]
# 34 M parameters in float32, 26 M of them in the decoder; rotary tables are small beside them.
HEAVY = replace(
    _TINY,
    text=replace(
        _TINY.text,
        hidden=1024,
        intermediate=2816,
        layers=2,
        heads=8,
        kv_heads=8,
        max_positions=1024,
    ),
    vision=replace(_TINY.vision, hidden=512, intermediate=2048, layers=2, heads=8, image_size=56),
)
