"""The CLIP vision tower: configuration and weights' names (https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.blocks.layers import ACTIVATIONS
from vlmforge_builder.blocks.vision import VisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.keys import KeyTable, check_keys
from vlmforge_builder.weights import Stacked, Stored, Transposed, Weight
from vlmforge_recipes.config_keys import TOWER

# What a checkpoint of the whole published model stores beside its tower.
WHOLE_MODEL = (
    r"text_model\..*",
    r"text_projection\.weight",
    r"visual_projection\.weight",
    "logit_scale",
)


def read_tower_config(
    vision: ConfigReader, *, feature_layer: int, keep_class_token: bool
) -> VisionConfig:
    """Geometry from a CLIP vision configuration; absent keys have `CLIPVisionConfig`'s defaults.

    Args:
        vision: The section of the tower.
        feature_layer: Index into the hidden states; 0 is the input of the first layer, -1 the
            output of the last one. Layers behind it are left out.
        keep_class_token: Whether the class token's feature is used too.

    Raises:
        CheckpointError: a number out of its range, or sizes that do not fit each other.
        UnsupportedModelError: another activation, or a feature layer that does not exist.
    """
    total = tower_layers(vision)
    layers = feature_layer if feature_layer >= 0 else total + 1 + feature_layer
    act = vision.str("hidden_act", "quick_gelu")
    if act not in ACTIVATIONS:
        raise _unsupported(vision, f"hidden_act {act!r}", ", ".join(sorted(ACTIVATIONS)))
    if not 0 <= layers <= total:
        expected = f"an index into {total + 1} hidden states"
        raise _unsupported(vision, f"feature layer {feature_layer}", expected)
    config = VisionConfig(
        image_size=vision.int("image_size", 224, within=limits.PIXELS),
        patch_size=vision.int("patch_size", 32, within=limits.PATCH),
        hidden_size=vision.int("hidden_size", 768, within=limits.WIDTH),
        intermediate_size=vision.int("intermediate_size", 3072, within=limits.WIDTH),
        layers=layers,
        heads=vision.int("num_attention_heads", 12, within=limits.HEADS),
        norm_eps=vision.float("layer_norm_eps", 1e-5, within=limits.EPSILON),
        activation=act,
        keep_class_token=keep_class_token,
    )
    check_tower(vision, config)
    return config


def tower_layers(vision: ConfigReader) -> int:
    """Layers of the tower, those that do not run included."""
    return vision.int("num_hidden_layers", 12, within=limits.LAYERS)


def check_tower(vision: ConfigReader, config: VisionConfig) -> None:
    """Refuse sizes that do not fit each other (CheckpointError)."""
    found, expected = "", ""
    if config.hidden_size % config.heads:
        found = f"a width of {config.hidden_size} in {config.heads} heads"
        expected = "heads of one width, side by side"
    elif config.patches < 1:
        found = f"image_size {config.image_size}, patch_size {config.patch_size}"
        expected = "at least one patch in an image"
    if found:
        raise CheckpointError(
            f"The vision tower of {vision.file} does not fit itself.",
            found=found,
            expected=expected,
            fix=f"check {vision.file.name} against the published one",
        )


def find_tower_config(
    folder: Path, tables: Iterable[KeyTable], config: ConfigReader
) -> ConfigReader:
    """The section of a tower in a folder of its own, for `read_tower_config`; its keys are checked.

    `config` is that of the checkpoint.

    Raises:
        CheckpointError: no such file, or a key that is unknown or refused.
    """
    reader = read_config(folder / "config.json", ignored=config.ignored)
    check_keys(reader, tables, TOWER)
    return reader.section("vision_config") if reader.has("vision_config") else reader


def check_projected(config: ConfigReader, tower: VisionConfig) -> None:
    """Check that the checkpoint's projector is made for the tower (CheckpointError)."""
    found = config.opt_int("mm_hidden_size")
    if found is not None and found != tower.hidden_size:
        raise CheckpointError(
            f"{config.file} does not fit the vision tower.",
            found=f"mm_hidden_size {found}",
            expected=f"{tower.hidden_size}, the tower's hidden_size",
            fix="check that mm_vision_tower is the tower of this checkpoint",
        )


def _unsupported(vision: ConfigReader, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The vision tower of {vision.file} is a variant that is not supported.",
        found=found,
        expected=expected,
        fix="check config.json against the published one",
    )


def tower_weights(config: VisionConfig, *, prefix: str) -> dict[str, Weight]:
    """Weights of the tower by our names; `prefix` begins the checkpoint's."""
    embeddings = f"{prefix}embeddings."
    weights: dict[str, Weight] = {
        "patch": Stored(f"{embeddings}patch_embedding.weight"),
        "positions": Stored(f"{embeddings}position_embedding.weight"),
    }
    if config.patch_bias:
        weights["patch_bias"] = Stored(f"{embeddings}patch_embedding.bias")
    if config.class_token:
        weights["class_token"] = Stored(f"{embeddings}class_embedding")
    if config.pre_norm:  # the published name has this spelling
        weights |= norm("pre_norm", f"{prefix}pre_layrnorm")
    if config.post_norm:
        weights |= norm("post_norm", f"{prefix}post_layernorm")
    for i in range(config.layers):
        weights |= _layer_weights(config, f"layers.{i}.", f"{prefix}encoder.layers.{i}.")
    return weights


def unused_in_tower(vision: ConfigReader, config: VisionConfig, *, prefix: str) -> tuple[str, ...]:
    """Patterns of the names of stored tensors that a tower of this depth does not read.

    They are of the layers behind the feature layer and of what is behind the layers; of layers that
    the configuration does not tell of there must be none.
    """
    start = re.escape(prefix)
    behind = "|".join(str(i) for i in range(config.layers, tower_layers(vision)))
    layers = (rf"{start}encoder\.layers\.({behind})\..*",) if behind else ()
    return (rf"{start}post_layernorm\.(weight|bias)", *layers)


def norm(ours: str, theirs: str) -> dict[str, Weight]:
    """Weights of a layer normalisation."""
    return {f"{ours}.{kind}": Stored(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def linear(
    ours: str, keys: tuple[str, ...], widths: tuple[int, ...], *, bias: bool = True
) -> dict[str, Weight]:
    """Weights of a linear layer made of the named ones, side by side."""
    weights: dict[str, Weight] = {
        f"{ours}.weight": Transposed(tuple(f"{key}.weight" for key in keys), widths)
    }
    if bias:
        weights[f"{ours}.bias"] = Stacked(tuple(f"{key}.bias" for key in keys), widths)
    return weights


def _layer_weights(config: VisionConfig, ours: str, theirs: str) -> dict[str, Weight]:
    width = config.hidden_size
    attn = f"{theirs}self_attn."
    qkv = tuple(f"{attn}{name}_proj" for name in "qkv")
    return {
        **norm(f"{ours}attn_norm", f"{theirs}layer_norm1"),
        **linear(f"{ours}attn.qkv", qkv, (width, width, width)),
        **linear(f"{ours}attn.out", (f"{attn}out_proj",), (width,)),
        **norm(f"{ours}mlp_norm", f"{theirs}layer_norm2"),
        **linear(f"{ours}fc1", (f"{theirs}mlp.fc1",), (config.intermediate_size,)),
        **linear(f"{ours}fc2", (f"{theirs}mlp.fc2",), (width,)),
    }
