"""The vision tower and its resampler: configuration, weights' names, pixels (`visual.py`)."""

from __future__ import annotations

import math
from functools import partial

from vlmforge.engine.images.pixels import PixelFormat
from vlmforge.engine.images.stretch import Stretch
from vlmforge.engine.interface import VisionInterface
from vlmforge.errors import UnsupportedModelError
from vlmforge_builder.blocks.resampler import ResampledEncoder, ResamplerConfig
from vlmforge_builder.blocks.vision import VisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.rearranged_weights import PerHead, ResizedGrid, Rows
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.weights import Stored, Transposed, Weight
from vlmforge_recipes.clip_tower import check_tower, linear, norm

_PREFIX = "transformer.visual."
# The tables of positions are of 16 x 16 places, whatever the image's size.
_GRID = 16
_NORM_EPS = 1e-6
_RESAMPLER_HEAD_DIM = 128
_RESAMPLER_WIDTHS = range(_RESAMPLER_HEAD_DIM, limits.WIDTH.stop, _RESAMPLER_HEAD_DIM)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def read_tower_config(visual: ConfigReader) -> VisionConfig:
    """Geometry of the tower from the section `visual`."""
    width = visual.int("width", within=limits.WIDTH)
    config = VisionConfig(
        image_size=visual.int("image_size", within=limits.PIXELS),
        patch_size=visual.int("patch_size", within=limits.PATCH),
        hidden_size=width,
        intermediate_size=int(width * visual.float("mlp_ratio", within=limits.RATIO)),
        layers=visual.int("layers", within=limits.LAYERS),
        heads=visual.int("heads", within=limits.HEADS),
        norm_eps=_NORM_EPS,
        activation="gelu",
        keep_class_token=False,
    )
    check_tower(visual, config)
    return config


def read_resampler_config(visual: ConfigReader) -> ResamplerConfig:
    """Geometry of the resampler.

    Raises:
        UnsupportedModelError: another number of queries than its table of positions has places.
    """
    queries = visual.int("n_queries", 256, within=limits.WIDTH)
    width = visual.int("output_dim", 512, within=_RESAMPLER_WIDTHS)
    if queries != _GRID**2:
        raise UnsupportedModelError(
            f"The resampler of {visual.file} is a variant that is not supported.",
            found=f"visual.n_queries {queries}, a grid of {math.sqrt(queries):.1f} a side",
            expected=f"{_GRID**2}",
            fix="choose a Qwen-VL-Chat checkpoint, or extend the recipe",
        )
    return ResamplerConfig(queries, width, width // _RESAMPLER_HEAD_DIM, _NORM_EPS)


def image_policy(tower: VisionConfig) -> Stretch:
    """The whole image squeezed into a square, as `ImageTransform` of the original does."""
    # The original's `convert("RGB")` leaves transparency out of account.
    return Stretch(
        PixelFormat("bicubic", 1 / 255, _MEAN, _STD), (tower.image_size, tower.image_size)
    )


def vision_part(tower: VisionConfig, resampler: ResamplerConfig) -> PartSpec:
    """Tower, resampler and projection as a part."""
    return PartSpec(
        name="vision",
        module=partial(ResampledEncoder, tower, resampler),
        interface=VisionInterface((tower.image_size,) * 2, resampler.queries, resampler.width),
        weights={
            **_tower_weights(tower),
            **_resampler_weights(resampler),
            **norm("norm", f"{_PREFIX}ln_post"),
            "proj.weight": Stored(f"{_PREFIX}proj"),  # x @ proj: not transposed
        },
    )


def _tower_weights(config: VisionConfig) -> dict[str, Weight]:
    weights: dict[str, Weight] = {
        "tower.patch": Stored(f"{_PREFIX}conv1.weight"),
        "tower.positions": ResizedGrid(f"{_PREFIX}positional_embedding", _GRID),
        **norm("tower.pre_norm", f"{_PREFIX}ln_pre"),
    }
    for i in range(config.layers):
        ours, theirs = f"tower.layers.{i}.", f"{_PREFIX}transformer.resblocks.{i}."
        weights |= {
            **norm(f"{ours}attn_norm", f"{theirs}ln_1"),
            f"{ours}attn.qkv.weight": PerHead(f"{theirs}attn.in_proj.weight", config.heads),
            f"{ours}attn.qkv.bias": PerHead(f"{theirs}attn.in_proj.bias", config.heads),
            **linear(f"{ours}attn.out", (f"{theirs}attn.out_proj",), (config.hidden_size,)),
            **norm(f"{ours}mlp_norm", f"{theirs}ln_2"),
            **linear(f"{ours}fc1", (f"{theirs}mlp.c_fc",), (config.intermediate_size,)),
            **linear(f"{ours}fc2", (f"{theirs}mlp.c_proj",), (config.hidden_size,)),
        }
    return weights


def _resampler_weights(config: ResamplerConfig) -> dict[str, Weight]:
    ours, theirs, width = "resampler.", f"{_PREFIX}attn_pool.", config.width
    weights: dict[str, Weight] = {
        f"{ours}queries": Stored(f"{theirs}query"),
        f"{ours}query_positions": Stored(f"{theirs}pos_embed"),
        f"{ours}key_positions": ResizedGrid(f"{theirs}pos_embed", _GRID),
        **norm(f"{ours}query_norm", f"{theirs}ln_q"),
        **norm(f"{ours}kv_norm", f"{theirs}ln_kv"),
        f"{ours}kv.weight": Transposed((f"{theirs}kv_proj.weight",), (width,)),
        **linear(f"{ours}out", (f"{theirs}attn.out_proj",), (width,)),
    }
    # The three projections are blocks of one matrix here, and not taken apart by heads.
    for place, name in enumerate("qkv"):
        start, total = place * width, 3 * width
        weights |= {
            f"{ours}{name}_proj.weight": Rows(f"{theirs}attn.in_proj_weight", start, total),
            f"{ours}{name}_proj.bias": Rows(f"{theirs}attn.in_proj_bias", start, total),
        }
    return weights
