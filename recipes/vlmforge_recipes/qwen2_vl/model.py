"""A checkpoint of the family: the decoder is Qwen2's, the towers differ."""

from __future__ import annotations

from pathlib import Path

from vlmforge.engine.images.patch_inputs import PatchInputs
from vlmforge.errors import CheckpointError
from vlmforge_builder.blocks.patch_vision import PatchVisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.store import open_store
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_recipes.clip_images import find_processor
from vlmforge_recipes.config_keys import check_files
from vlmforge_recipes.llama_decoder import read_decoder_config, trained_length
from vlmforge_recipes.patch_images import TowerGrid, read_patches
from vlmforge_recipes.patch_tower import (
    TowerNames,
    check_heads,
    inverse_frequencies,
    read_activation,
    vision_theta,
)
from vlmforge_recipes.patch_vlm import (
    Understood,
    assemble,
    check_width,
    in_sections,
    outside,
    read_sections,
    whole_numbers,
)
from vlmforge_recipes.qwen2_vl.layout import QWEN2_5_VL, architecture_of, check, tables_of, text_of
from vlmforge_recipes.tower_choice import refuse_tower_options

_NORM_EPS = 1e-6  # `LayerNorm` and `Qwen2_5_VLRMSNorm` of the towers, whatever the file says
_SECTIONS = (16, 24, 24)
_WHOLE = (7, 15, 23, 31)
_MERGER = ("ln_q", "mlp.0", "mlp.2")
_PLAIN = TowerNames((("fc1",), "fc2"), _MERGER)
_GATED = TowerNames((("gate_proj", "up_proj"), "down_proj"), _MERGER)
# As published, and as transformers 4.52 and later may save them.
_PREFIXES = (("model.", "model.language_model."), ("visual.", "model.visual."))
_KIND = {False: "qwen2_vl_text", True: "qwen2_5_vl_text"}


def load(checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
    """Understand a checkpoint (CheckpointError otherwise)."""
    check(config)
    refuse_tower_options(options)
    check_files(checkpoint, tables_of(config), config)
    windowed, text = architecture_of(config) == QWEN2_5_VL, text_of(config)
    kind = _KIND[windowed]
    decoder = read_decoder_config(text, session_len=options.session_len, kind=kind)
    vision = config.section("vision_config")
    grid = _grid(vision, windowed=windowed)
    image = read_patches(find_processor(checkpoint, tables_of(config), config), grid)
    tower = (_windowed if windowed else _full)(vision, image.patch_inputs)
    check_width(vision, tower.outputs, decoder.hidden_size)
    sections = read_sections(text, decoder.head_dim, _SECTIONS)
    found = Understood(
        architecture=architecture_of(config) or "",
        config=config,
        text=text,
        decoder=outside(decoder),
        tower=tower,
        image=image,
        trained=trained_length(text, kind=kind),
        axes=in_sections(sections),
        names=_GATED if windowed else _PLAIN,
        prefixes=_PREFIXES,
    )
    return assemble(found, checkpoint, open_store(checkpoint, options.note), options)


def _full(vision: ConfigReader, inputs: PatchInputs) -> PatchVisionConfig:
    """Qwen2-VL: layer norms, plain MLPs, attention over the whole image."""
    hidden, heads = _width(vision, windowed=False)
    return PatchVisionConfig(
        inputs=inputs,
        hidden_size=hidden,
        intermediate_size=int(hidden * vision.float("mlp_ratio", 4, within=limits.RATIO)),
        layers=vision.int("depth", 32, within=limits.LAYERS),
        heads=heads,
        norm_eps=_NORM_EPS,
        activation=read_activation(vision, "quick_gelu"),
        gated=False,
        patch_bias=False,
        outputs=vision.int("hidden_size", 3584, within=limits.WIDTH),
    )


def _windowed(vision: ConfigReader, inputs: PatchInputs) -> PatchVisionConfig:
    """Qwen2.5-VL: RMS norms, gated MLPs, attention in windows but in some layers."""
    hidden, heads = _width(vision, windowed=True)
    layers = vision.int("depth", 32, within=limits.LAYERS)
    return PatchVisionConfig(
        inputs=inputs,
        hidden_size=hidden,
        intermediate_size=vision.int("intermediate_size", 3420, within=limits.WIDTH),
        layers=layers,
        heads=heads,
        norm_eps=_NORM_EPS,
        activation=read_activation(vision, "silu"),
        gated=True,
        patch_bias=False,
        outputs=vision.int("out_hidden_size", 3584, within=limits.WIDTH),
        whole=_whole(vision, layers),
    )


def _width(vision: ConfigReader, *, windowed: bool) -> tuple[int, int]:
    """The tower's width, and its heads."""
    key, default = ("hidden_size", 3584) if windowed else ("embed_dim", 1280)
    hidden = vision.int(key, default, within=limits.WIDTH)
    heads = vision.int("num_heads", 16, within=limits.HEADS)
    check_heads(vision, hidden, heads)
    return hidden, heads


def _grid(vision: ConfigReader, *, windowed: bool) -> TowerGrid:
    hidden, heads = _width(vision, windowed=windowed)
    patch = vision.int("patch_size", 14, within=limits.PATCH)
    merge = vision.int("spatial_merge_size", 2, within=limits.MERGE)
    window = vision.int("window_size", 112, within=limits.PIXELS) if windowed else 0
    side = window // merge // patch
    if windowed and not side:
        raise CheckpointError(
            f"{vision.file} has windows that are smaller than a token.",
            found=f"window_size {window}",
            expected=f"at least {merge * patch}",
            fix=f"check {vision.file.name} against the published one",
        )
    return TowerGrid(
        patch=patch,
        frames=vision.int("temporal_patch_size", 2, within=limits.FRAMES),
        merge=merge,
        inverse_frequencies=inverse_frequencies(hidden // heads, vision_theta(vision)),
        window=side,
    )


def _whole(vision: ConfigReader, layers: int) -> frozenset[int]:
    value = vision.get("fullatt_block_indexes")
    if value is None:  # a tower with fewer layers has fewer of the default's
        return frozenset(i for i in _WHOLE if i < layers)
    found = whole_numbers(value)
    if all(i < layers for i in found) and (found or value == []):
        return frozenset(found)
    raise CheckpointError(
        f"{vision.file} has a wrong fullatt_block_indexes.",
        found=repr(value)[:80],
        expected=f"a list of numbers of layers, from 0 to {layers - 1}",
        fix=f"check {vision.file.name} against the published one",
    )
