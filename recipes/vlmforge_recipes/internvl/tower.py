"""InternViT: its configuration and its weights' names (`InternVLVisionModel` of transformers)."""

from __future__ import annotations

from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.blocks.layers import ACTIVATIONS
from vlmforge_builder.blocks.vision import VisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.rearranged_weights import Reshaped
from vlmforge_builder.weights import Stored, Weight
from vlmforge_recipes.clip_tower import check_tower, linear, norm

_LAYERS_NORM = "layer_norm"


def read_tower(vision: ConfigReader) -> VisionConfig:
    """Geometry; absent keys have the defaults of `InternVLVisionConfig`.

    Raises:
        CheckpointError: a number out of its range, or sizes that do not fit each other.
        UnsupportedModelError: another activation, or another kind of norm.
    """
    act, kind = vision.str("hidden_act", "gelu"), vision.str("norm_type", _LAYERS_NORM)
    if act not in ACTIVATIONS:
        raise _unsupported(vision, f"hidden_act {act!r}", ", ".join(sorted(ACTIVATIONS)))
    if kind != _LAYERS_NORM:
        raise _unsupported(vision, f"norm_type {kind!r}", f"{_LAYERS_NORM!r}, as InternViT-300M")
    config = VisionConfig(
        image_size=_side(vision, "image_size", 448, limits.PIXELS),
        patch_size=_side(vision, "patch_size", 14, limits.PATCH),
        hidden_size=vision.int("hidden_size", 1024, within=limits.WIDTH),
        intermediate_size=vision.int("intermediate_size", 4096, within=limits.WIDTH),
        layers=vision.int("num_hidden_layers", 24, within=limits.LAYERS),
        heads=vision.int("num_attention_heads", 16, within=limits.HEADS),
        norm_eps=vision.float("layer_norm_eps", 1e-6, within=limits.EPSILON),
        activation=act,
        patch_bias=True,
        qkv_bias=vision.bool("attention_bias", default=False),
        pre_norm=False,
        post_norm=not vision.bool("use_mean_pooling", default=True),
        layer_scale=True,
    )
    check_tower(vision, config)
    return config


def _side(vision: ConfigReader, key: str, default: int, within: range) -> int:
    """A length, given once or for both sides."""
    value = vision.get(key)
    if not isinstance(value, list):
        return vision.int(key, default, within=within)
    if len(value) != 2 or value[0] != value[1]:
        raise CheckpointError(
            f"{vision.file} has a wrong {vision.place}.{key}.",
            found=repr(value)[:80],
            expected="a length, or the same twice: views are square",
            fix="check config.json against the published one",
        )
    return ConfigReader({key: value[0]}, vision.file, vision.place).int(key, within=within)


def _unsupported(vision: ConfigReader, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The vision tower of {vision.file} is a variant that is not supported.",
        found=found,
        expected=expected,
        fix="choose a checkpoint with InternViT-300M: all up to 14B have it",
    )


def tower_weights(config: VisionConfig, prefix: str) -> dict[str, Weight]:
    """Weights of the tower by our names; `prefix` begins the checkpoint's."""
    embeddings, width = f"{prefix}embeddings.", config.hidden_size
    patches = f"{embeddings}patch_embeddings.projection"
    weights: dict[str, Weight] = {
        "patch": Stored(f"{patches}.weight"),
        "patch_bias": Stored(f"{patches}.bias"),
        "class_token": Reshaped(f"{embeddings}cls_token", (1, 1, width)),
        "positions": Reshaped(f"{embeddings}position_embeddings", (1, config.patches + 1, width)),
    }
    for i in range(config.layers):
        weights |= _layer_weights(config, f"layers.{i}.", f"{prefix}encoder.layer.{i}.")
    if config.post_norm:
        weights |= norm("post_norm", f"{prefix}layernorm")
    return weights


def _layer_weights(config: VisionConfig, ours: str, theirs: str) -> dict[str, Weight]:
    width, attn = config.hidden_size, f"{theirs}attention."
    qkv = tuple(f"{attn}{name}_proj" for name in "qkv")
    return {
        **norm(f"{ours}attn_norm", f"{theirs}layernorm_before"),
        **linear(f"{ours}attn.qkv", qkv, (width,) * 3, bias=config.qkv_bias),
        **linear(f"{ours}attn.out", (f"{attn}projection_layer",), (width,)),
        f"{ours}attn_scale": Stored(f"{theirs}lambda_1"),
        **norm(f"{ours}mlp_norm", f"{theirs}layernorm_after"),
        **linear(f"{ours}fc1", (f"{theirs}mlp.fc1",), (config.intermediate_size,)),
        **linear(f"{ours}fc2", (f"{theirs}mlp.fc2",), (width,)),
        f"{ours}mlp_scale": Stored(f"{theirs}lambda_2"),
    }
