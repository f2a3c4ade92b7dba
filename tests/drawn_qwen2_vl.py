"""Tiny random checkpoints of Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Mapping

from drawn_patch_models import Shape, features, places, processor, write

__all__ = ["SHAPES", "features", "places", "processor", "write"]

_ROPE = {"type": "mrope", "mrope_section": [4, 6, 6]}
_TEXT = {"rope_scaling": _ROPE, "rope_theta": 123000.0}
_WINDOWED = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 40,
    "out_hidden_size": 128,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
_PLAIN = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 128}

SHAPES: Mapping[str, Shape] = {
    # As published: the text's keys at the top.
    "windowed": Shape("Qwen2_5_VLForConditionalGeneration", _TEXT, _WINDOWED, flat=True),
    "plain": Shape("Qwen2VLForConditionalGeneration", _TEXT, _PLAIN, flat=True, seed=2),
    # As transformers 5 saves it; no groups of heads, one matrix for both ends, larger images.
    "nested": Shape(
        "Qwen2_5_VLForConditionalGeneration",
        {**_TEXT, "num_key_value_heads": 4},
        {**_WINDOWED, "depth": 3, "window_size": 112, "fullatt_block_indexes": [0, 2]},
        tied=True,
        least=56 * 56 * 4,
        most=28 * 28 * 200,
        seed=3,
    ),
    "nested_plain": Shape("Qwen2VLForConditionalGeneration", _TEXT, _PLAIN, tied=True, seed=6),
}
