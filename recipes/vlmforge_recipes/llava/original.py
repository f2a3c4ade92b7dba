"""The original layout (`LlavaLlamaForCausalLM`, `LlavaMistralForCausalLM`).

The vision tower lies elsewhere; v1.6 has its own, fine-tuned one inside, and takes only the other's
configuration.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.images.anyres import AnyRes
from vlmforge.engine.images.tiling import UnpaddedLines
from vlmforge.engine.prompts import SplitText
from vlmforge.errors import UnsupportedModelError
from vlmforge_builder.blocks.vision import ProjectorConfig, VisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.keys import KeyTable, check_keys
from vlmforge_builder.checkpoint.store import TensorStore, open_store
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer, convert_tokenizer
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
from vlmforge_recipes.llava.anyres import MERGES, PINPOINTS, original_anyres
from vlmforge_recipes.llava.keys import LAYOUTS
from vlmforge_recipes.llava.layout import ORIGINAL_MISTRAL, layout_of
from vlmforge_recipes.llava.templates import PLACEHOLDER, TEMPLATES, original_template
from vlmforge_recipes.output_head import choose_head
from vlmforge_recipes.spliced_vlm import Geometry, Names, Prompting, assemble
from vlmforge_recipes.tower_choice import choose_tower
from vlmforge_recipes.tower_folder import find_tower

# The id that the original code puts where an image goes (`IMAGE_TOKEN_INDEX`).
_IMAGE_TOKEN_INDEX = -200
_NEWLINE = "model.image_newline"


def load_original(checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
    """Understand a checkpoint of this layout (CheckpointError otherwise)."""
    _check(config)
    check_files(checkpoint, _tables(config), config, prefer_model=_kind(config) != "mistral")
    # Before anything else is fetched: a folder without weights is no checkpoint.
    own = open_store(checkpoint, options.note)
    folder = find_tower(checkpoint, config.str("mm_vision_tower"), options)
    vision = find_tower_config(folder, _tables(config), config)
    tower = _tower(config, vision)
    image = _image_policy(config, folder, tower)
    kind, trained = _kind(config), _trained(config)
    decoder = read_decoder_config(config, session_len=options.session_len or trained, kind=kind)
    chosen = choose_tower(own, config, folder, options)
    tokenizer = _tokenizer(checkpoint, config)
    return assemble(
        Geometry(decoder, tower, ProjectorConfig("gelu"), trained, layout_of(config) or ""),
        dataclasses.replace(
            _names(own, config, options, newline=_has_newline(image)),
            tower=tower_weights(tower, prefix=chosen.prefix),
        ),
        chosen.store,
        image,
        tokenizer,
        Prompting(
            original_template(kind, tokenizer),
            PLACEHOLDER,
            SplitText(),
            _IMAGE_TOKEN_INDEX,
            TEMPLATES,
        ),
        options,
        extra_files=(folder,),
        # Stored and not used where images are not in lines.
        unused=(
            *chosen.unused,
            *unused_in_tower(vision, tower, prefix=chosen.prefix),
            re.escape(_NEWLINE),
        ),
    )


def _kind(config: ConfigReader) -> str:
    return "mistral" if layout_of(config) == ORIGINAL_MISTRAL else "llama"


def _trained(config: ConfigReader) -> int:
    """The original cuts longer prompts at `tokenizer_model_max_length`; here it is the window."""
    length = trained_length(config, kind=_kind(config))
    cut = config.opt_int("tokenizer_model_max_length", within=limits.UNBOUNDED)
    return length if cut is None else min(length, cut)


def _tables(config: ConfigReader) -> tuple[KeyTable, ...]:
    return LAYOUTS[layout_of(config) or "", _kind(config)]


def _tower(config: ConfigReader, vision: ConfigReader) -> VisionConfig:
    tower = read_tower_config(
        vision,
        feature_layer=config.int("mm_vision_select_layer", -2, within=limits.FEATURE_LAYER),
        keep_class_token=config.str("mm_vision_select_feature", "patch") == "cls_patch",
    )
    check_projected(config, tower)
    return tower


def _image_policy(config: ConfigReader, folder: Path, tower: VisionConfig) -> ImagePolicy:
    aspect = config.str("image_aspect_ratio", "square")
    processor = find_tower_processor(folder, _tables(config), config)
    if aspect == "anyres":
        return original_anyres(processor, tower, config)
    return read_image_policy(processor, image_size=tower.image_size, pad_to_square=aspect == "pad")


def _has_newline(image: ImagePolicy) -> bool:
    return isinstance(image, AnyRes) and isinstance(image.tiling.merge, UnpaddedLines)


def _names(
    own: TensorStore,
    config: ConfigReader,
    options: RecipeOptions,
    *,
    newline: bool,
) -> Names:
    head = choose_head(
        own,
        ("lm_head.weight",),
        "model.embed_tokens.weight",
        tied=config.bool("tie_word_embeddings", default=False),
        note=options.note,
    )
    return Names(
        "model.",
        head,
        {},
        ("model.mm_projector.0", "model.mm_projector.2"),
        newline=_NEWLINE if newline else None,
    )


def _tokenizer(checkpoint: Path, config: ConfigReader) -> ConvertedTokenizer:
    """The class that the original loads: for Mistral the fast one, otherwise SentencePiece."""
    if _kind(config) == "mistral":
        # The fast class of the time puts a space before every section, whatever `legacy` says.
        made = convert_tokenizer(checkpoint, invalid_bytes="whole_run", legacy=True)
    else:
        made = convert_tokenizer(checkpoint, prefer_model=True)
    return with_end_ids(made, checkpoint, config)


def _check(config: ConfigReader) -> None:
    known = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch"),
        "image_aspect_ratio": ("pad", "square", "anyres"),
        "mm_patch_merge_type": tuple(MERGES),
    }
    defaults = {"mm_projector_type": "linear"}
    for key, values in known.items():
        value = config.str(key, defaults.get(key, values[0]))
        if value not in values:
            raise _unsupported(config, f"{key} {value!r}", " or ".join(repr(v) for v in values))
    if config.str("image_aspect_ratio", "square") == "anyres" and not config.has(PINPOINTS):
        raise _unsupported(config, f"image_aspect_ratio 'anyres' without {PINPOINTS}", PINPOINTS)
    check_keys(config, _tables(config))


def _unsupported(config: ConfigReader, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{config.file} describes a variant that this recipe does not know.",
        found=found,
        expected=expected,
        fix="choose a published LLaVA checkpoint, or extend the recipe",
    )


def check_variant(config: ConfigReader) -> None:
    """Refuse variants of this layout that `config.json` tells of (UnsupportedModelError)."""
    _check(config)
