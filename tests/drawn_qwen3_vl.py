"""Tiny random checkpoints of Qwen3-VL."""

from __future__ import annotations

from collections.abc import Mapping

from drawn_patch_models import Shape, features, places, processor, write

__all__ = ["SHAPES", "features", "places", "processor", "write"]

_ROPE = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
_TEXT = {"rope_scaling": _ROPE, "rope_theta": 5000000.0, "head_dim": 32, "hidden_size": 96}
_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 40,
    "out_hidden_size": 96,
    "num_position_embeddings": 49,
    "deepstack_visual_indexes": [0, 2],
    "patch_size": 16,
}

SHAPES: Mapping[str, Shape] = {
    # Heads whose width is none of hidden_size / num_attention_heads.
    "first": Shape("Qwen3VLForConditionalGeneration", _TEXT, _VISION, tied=True),
    "untied": Shape(
        "Qwen3VLForConditionalGeneration",
        {**_TEXT, "num_hidden_layers": 3, "num_key_value_heads": 1},
        {**_VISION, "deepstack_visual_indexes": [0, 1, 3]},
        least=64 * 64 * 4,
        most=32 * 32 * 200,
        seed=5,
    ),
}
