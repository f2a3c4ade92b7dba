"""A checkpoint of the family: Qwen3's decoder, a tower with a table of places and taps."""

from __future__ import annotations

import math
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
    interleaved,
    outside,
    read_sections,
    whole_numbers,
)
from vlmforge_recipes.qwen3_vl.keys import tables_of
from vlmforge_recipes.tower_choice import refuse_tower_options

_NORM_EPS = 1e-6  # of the tower's norms, whatever the file says
_SECTIONS = (24, 20, 20)
_TAPPED = (8, 16, 24)
_KIND = "qwen3_vl_text"
_NAMES = TowerNames(
    (("linear_fc1",), "linear_fc2"),
    ("norm", "linear_fc1", "linear_fc2"),
    "deepstack_merger_list",
)
_PREFIXES = (("model.language_model.",), ("model.visual.",))


def load(
    checkpoint: Path, config: ConfigReader, options: RecipeOptions, *, architecture: str
) -> ModelSpec:
    """Understand a checkpoint (CheckpointError otherwise)."""
    refuse_tower_options(options)
    tables = tables_of(config)
    check_files(checkpoint, tables, config)
    text, vision = config.section("text_config"), config.section("vision_config")
    decoder = read_decoder_config(text, session_len=options.session_len, kind=_KIND)
    image = read_patches(find_processor(checkpoint, tables, config), _grid(vision))
    tower = _tower(vision, image.patch_inputs)
    check_width(vision, tower.outputs, decoder.hidden_size)
    if len(tower.tapped) > decoder.layers:
        raise _wrong(vision, tower.tapped, f"at most as many as the {decoder.layers} layers")
    found = Understood(
        architecture=architecture,
        config=config,
        text=text,
        decoder=outside(decoder, 1 + len(tower.tapped)),
        tower=tower,
        image=image,
        trained=trained_length(text, kind=_KIND),
        axes=interleaved(read_sections(text, decoder.head_dim, _SECTIONS)),
        names=_NAMES,
        prefixes=_PREFIXES,
    )
    return assemble(found, checkpoint, open_store(checkpoint, options.note), options)


def _tower(vision: ConfigReader, inputs: PatchInputs) -> PatchVisionConfig:
    layers = vision.int("depth", 27, within=limits.LAYERS)
    return PatchVisionConfig(
        inputs=inputs,
        hidden_size=vision.int("hidden_size", 1152, within=limits.WIDTH),
        intermediate_size=vision.int("intermediate_size", 4304, within=limits.WIDTH),
        layers=layers,
        heads=vision.int("num_heads", 16, within=limits.HEADS),
        norm_eps=_NORM_EPS,
        activation=read_activation(vision, "gelu_pytorch_tanh"),
        gated=False,
        patch_bias=True,
        outputs=vision.int("out_hidden_size", 3584, within=limits.WIDTH),
        table=_table(vision),
        tapped=_tapped(vision, layers),
    )


def _grid(vision: ConfigReader) -> TowerGrid:
    hidden = vision.int("hidden_size", 1152, within=limits.WIDTH)
    heads = vision.int("num_heads", 16, within=limits.HEADS)
    check_heads(vision, hidden, heads)
    return TowerGrid(
        patch=vision.int("patch_size", 16, within=limits.PATCH),
        frames=vision.int("temporal_patch_size", 2, within=limits.FRAMES),
        merge=vision.int("spatial_merge_size", 2, within=limits.MERGE),
        inverse_frequencies=inverse_frequencies(hidden // heads, vision_theta(vision)),
        table=math.isqrt(_table(vision)),
    )


def _table(vision: ConfigReader) -> int:
    places = vision.int("num_position_embeddings", 2304, within=limits.TABLE)
    if math.isqrt(places) ** 2 == places:
        return places
    raise CheckpointError(
        f"{vision.file} has a table of places that is no square.",
        found=f"num_position_embeddings {places}",
        expected="the square of a whole number",
        fix=f"check {vision.file.name} against the published one",
    )


def _tapped(vision: ConfigReader, layers: int) -> tuple[int, ...]:
    value = vision.get("deepstack_visual_indexes")
    found = list(_TAPPED) if value is None else whole_numbers(value)
    known = all(i < layers for i in found) and (found or value in (None, []))
    if not known or sorted(set(found)) != found or len(found) > limits.MERGE[-1] - 1:
        raise _wrong(vision, value, f"ascending numbers of layers, from 0 to {layers - 1}")
    return tuple(found)


def _wrong(vision: ConfigReader, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{vision.file} has a wrong deepstack_visual_indexes.",
        found=repr(found)[:80],
        expected=expected,
        fix=f"check {vision.file.name} against the published one",
    )
