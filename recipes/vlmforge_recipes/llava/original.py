"""LLaVA 1.5 in the original layout (`LlavaLlamaForCausalLM`): its vision tower lies elsewhere."""

from __future__ import annotations

from pathlib import Path

from vlmforge.errors import UnsupportedModelError
from vlmforge.prompt.template import jinja_from_parts
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.store import JoinedStore, open_store
from vlmforge_builder.recipe import ChatTemplate, ModelSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import convert_tokenizer
from vlmforge_recipes.clip_images import read_image_policy
from vlmforge_recipes.clip_tower import read_tower_config
from vlmforge_recipes.llama_decoder import read_decoder_config, trained_length
from vlmforge_recipes.llava.layout import ORIGINAL
from vlmforge_recipes.llava.templates import PLACEHOLDER, TEMPLATES
from vlmforge_recipes.spliced_vlm import Geometry, Names, Prompting, assemble
from vlmforge_recipes.tower_folder import find_tower

ARCHITECTURE = ORIGINAL
# The id that the original code puts where an image goes (`IMAGE_TOKEN_INDEX`).
_IMAGE_TOKEN_INDEX = -200
_DEFAULT_TEMPLATE = "llava-v1"
_TOWER_KEYS = ("vision_model.", "model.vision_tower.vision_tower.vision_model.")


def load_original(checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
    """Understand a checkpoint of this layout (CheckpointError otherwise)."""
    _check(config)
    folder = find_tower(checkpoint, config.str("mm_vision_tower"), options)
    tower_config = read_config(folder / "config.json")
    vision = (
        tower_config.section("vision_config") if tower_config.has("vision_config") else tower_config
    )
    decoder = read_decoder_config(config, session_len=options.session_len)
    tower = read_tower_config(
        vision,
        feature_layer=config.int("mm_vision_select_layer", -2),
        keep_class_token=config.str("mm_vision_select_feature", "patch") == "cls_patch",
    )
    own = open_store(checkpoint)
    # A fine-tuned tower inside the checkpoint wins over the stock one.
    inside = f"{_TOWER_KEYS[1]}embeddings.class_embedding" in own
    store = own if inside else JoinedStore((own, open_store(folder)))
    names = Names(
        "model.",
        "lm_head.weight",
        _TOWER_KEYS[1] if inside else _TOWER_KEYS[0],
        ("model.mm_projector.0", "model.mm_projector.2"),
    )
    if config.bool("tie_word_embeddings", default=False):
        names = names.tied()
    pad = config.str("image_aspect_ratio", "square") == "pad"
    template = jinja_from_parts(TEMPLATES[_DEFAULT_TEMPLATE], PLACEHOLDER)
    return assemble(
        Geometry(decoder, tower, trained_length(config), "gelu", ARCHITECTURE),
        names,
        store,
        read_image_policy(folder, image_size=tower.image_size, pad_to_square=pad),
        convert_tokenizer(checkpoint),
        Prompting(
            ChatTemplate(_DEFAULT_TEMPLATE, template, ()),
            PLACEHOLDER,
            "split_text",
            _IMAGE_TOKEN_INDEX,
            TEMPLATES,
        ),
        options,
        extra_files=(folder,),
    )


def _check(config: ConfigReader) -> None:
    known = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch"),
        "image_aspect_ratio": ("pad", "square"),
        "mm_patch_merge_type": ("flat",),
    }
    defaults = {"mm_projector_type": "linear"}
    for key, values in known.items():
        value = config.str(key, defaults.get(key, values[0]))
        if value not in values:
            raise _unsupported(config, f"{key} {value!r}", " or ".join(repr(v) for v in values))
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if config.bool(key, default=False):
            raise _unsupported(config, f"{key} true", "false")


def _unsupported(config: ConfigReader, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{config.file} describes a variant that this recipe does not know.",
        found=found,
        expected=expected,
        fix="choose a LLaVA 1.5 checkpoint, or extend the recipe",
    )


def check_variant(config: ConfigReader) -> None:
    """Refuse variants of this layout that `config.json` tells of (UnsupportedModelError)."""
    _check(config)
