"""SigLIP as Idefics3 has it (`Idefics3VisionTransformer` of transformers): its configuration.

Its weights are called as CLIP's; its positions are looked up by where a patch is in the image.
"""

from __future__ import annotations

import torch

from vlmforge.errors import UnsupportedModelError
from vlmforge_builder.blocks.layers import ACTIVATIONS
from vlmforge_builder.blocks.vision import VisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.rearranged_weights import Gathered
from vlmforge_builder.weights import Weight
from vlmforge_recipes import clip_tower


def read_tower(vision: ConfigReader) -> VisionConfig:
    """Geometry; absent keys have the defaults of `Idefics3VisionConfig`.

    Raises:
        CheckpointError: a number out of its range, or sizes that do not fit each other.
        UnsupportedModelError: another activation.
    """
    act = vision.str("hidden_act", "gelu_pytorch_tanh")
    if act not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"The vision tower of {vision.file} is a variant that is not supported.",
            found=f"hidden_act {act!r}",
            expected=", ".join(sorted(ACTIVATIONS)),
            fix="check config.json against the published one",
        )
    config = VisionConfig(
        image_size=vision.int("image_size", 224, within=limits.PIXELS),
        patch_size=vision.int("patch_size", 32, within=limits.PATCH),
        hidden_size=vision.int("hidden_size", 1152, within=limits.WIDTH),
        intermediate_size=vision.int("intermediate_size", 3072, within=limits.WIDTH),
        layers=vision.int("num_hidden_layers", 12, within=limits.LAYERS),
        heads=vision.int("num_attention_heads", 16, within=limits.HEADS),
        norm_eps=vision.float("layer_norm_eps", 1e-6, within=limits.EPSILON),
        activation=act,
        class_token=False,
        patch_bias=True,
        pre_norm=False,
        post_norm=True,
    )
    clip_tower.check_tower(vision, config)
    return config


def tower_weights(config: VisionConfig, prefix: str) -> dict[str, Weight]:
    """Weights of the tower by our names; `prefix` begins the checkpoint's."""
    weights = clip_tower.tower_weights(config, prefix=prefix)
    table = f"{prefix}embeddings.position_embedding.weight"
    places = position_ids(config.image_size // config.patch_size)
    return {**weights, "positions": Gathered(table, config.patches, places)}


def position_ids(side: int) -> tuple[int, ...]:
    """The row of the table of positions of each patch of a view of `side` x `side`.

    Of a whole view the buckets of `Idefics3VisionEmbeddings` are the patches themselves, but for
    what float32 makes of their borders: the same is calculated here.
    """
    borders = torch.arange(1 / side, 1.0, 1 / side)
    step = 1.0 / torch.tensor(side)
    places = torch.clamp(torch.arange(side, dtype=torch.float32) * step, max=1.0 - 1e-6)
    buckets = torch.bucketize(places, borders, right=True)
    return tuple((buckets[:, None] * side + buckets[None]).flatten().tolist())
