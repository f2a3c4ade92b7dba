"""A checkpoint of the family: its decoder in shards, its vision tower in a folder inside.

The shards repeat the tower; the original code loads that of the folder, and so do we, with a
warning where they differ.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.prompts import SplitText
from vlmforge.inputs.template import jinja_from_parts
from vlmforge_builder.blocks.vision import ProjectorConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.store import open_store
from vlmforge_builder.recipe import ChatTemplate, ModelSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import convert_tokenizer
from vlmforge_recipes.clip_images import find_tower_processor, read_image_policy
from vlmforge_recipes.clip_tower import (
    check_projected,
    find_tower_config,
    read_tower_config,
    tower_weights,
    unused_in_tower,
)
from vlmforge_recipes.config_keys import check_files
from vlmforge_recipes.end_ids import with_end_ids
from vlmforge_recipes.llama_decoder import read_decoder_config, trained_length
from vlmforge_recipes.output_head import choose_head
from vlmforge_recipes.spliced_vlm import Geometry, Names, Prompting, assemble
from vlmforge_recipes.tower_choice import choose_tower
from vlmforge_recipes.tower_folder import find_tower
from vlmforge_recipes.yi_vl.keys import TABLES
from vlmforge_recipes.yi_vl.layout import ARCHITECTURE, check
from vlmforge_recipes.yi_vl.templates import DEFAULT, PLACEHOLDER, TEMPLATES

# The id that the original code puts where an image goes (`IMAGE_TOKEN_INDEX`).
_IMAGE_TOKEN_INDEX = -200
# `mm_projector` is [Linear, LayerNorm, GELU, Linear, LayerNorm], each norm with torch's default.
_PROJECTOR = ProjectorConfig("gelu", norm_eps=1e-5)
_NAMES = Names(
    "model.",
    "lm_head.weight",
    {},
    ("model.mm_projector.0", "model.mm_projector.3"),
    {1: "model.mm_projector.1", 2: "model.mm_projector.4"},
)


def load(checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
    """Understand a checkpoint (CheckpointError otherwise)."""
    check(config)
    check_files(checkpoint, TABLES, config)
    own = open_store(checkpoint, options.note)
    folder = find_tower(checkpoint, config.str("mm_vision_tower"), options)
    vision = find_tower_config(folder, TABLES, config)
    decoder = read_decoder_config(config, session_len=options.session_len)
    tower = read_tower_config(
        vision,
        feature_layer=config.int("mm_vision_select_layer", -2, within=limits.FEATURE_LAYER),
        keep_class_token=config.str("mm_vision_select_feature", "patch") == "cls_patch",
    )
    check_projected(config, tower)
    chosen = choose_tower(own, config, folder, options)
    head = choose_head(
        own,
        ("lm_head.weight",),
        "model.embed_tokens.weight",
        tied=config.bool("tie_word_embeddings", default=False),
        note=options.note,
    )
    template = jinja_from_parts(TEMPLATES[DEFAULT], PLACEHOLDER)
    image, others = _images(config, folder, tower.image_size)
    spec = assemble(
        Geometry(decoder, tower, _PROJECTOR, trained_length(config), ARCHITECTURE),
        dataclasses.replace(_NAMES, head=head, tower=tower_weights(tower, prefix=chosen.prefix)),
        chosen.store,
        image,
        with_end_ids(convert_tokenizer(checkpoint), checkpoint, config),
        Prompting(
            ChatTemplate(DEFAULT, template, TEMPLATES[DEFAULT].stop_words),
            PLACEHOLDER,
            SplitText(),
            _IMAGE_TOKEN_INDEX,
            TEMPLATES,
        ),
        options,
        extra_files=(folder,),
        unused=(*chosen.unused, *unused_in_tower(vision, tower, prefix=chosen.prefix)),
    )
    return dataclasses.replace(spec, other_images=others)


def _images(
    config: ConfigReader, folder: Path, size: int
) -> tuple[ImagePolicy, tuple[ImagePolicy, ...]]:
    """The default preprocessing, and the other official one.

    `single_inference.py` and `openai_api.py` pad to a square if the config says so; `cli.py` never
    does.
    """
    processor = find_tower_processor(folder, TABLES, config)
    pads, crops = (
        read_image_policy(processor, image_size=size, pad_to_square=pad) for pad in (True, False)
    )
    if config.str("image_aspect_ratio", "square") == "pad":
        return pads, (crops,)
    return crops, (pads,)
