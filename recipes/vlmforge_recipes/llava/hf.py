"""The layout of transformers.

`LlavaForConditionalGeneration` (v1.5) and `LlavaNextForConditionalGeneration` (v1.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmforge.errors import CheckpointError, TensorError, UnsupportedModelError
from vlmforge.vl.preprocess import ImagePolicy
from vlmforge_builder.blocks.vision import VisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.compare import same_values
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.store import TensorStore, open_store
from vlmforge_builder.recipe import ChatTemplate, ModelSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer, convert_tokenizer
from vlmforge_recipes.clip_images import find_processor, read_image_policy
from vlmforge_recipes.clip_tower import read_tower_config, unused_in_tower
from vlmforge_recipes.llama_decoder import TEXT_DEFAULTS, read_decoder_config, trained_length
from vlmforge_recipes.llava.anyres import hf_tiling
from vlmforge_recipes.llava.end_ids import with_end_ids
from vlmforge_recipes.llava.layout import HF_ANYRES, layout_of
from vlmforge_recipes.llava.templates import (
    PLACEHOLDER,
    PUBLISHED_HF_TEMPLATE,
    TEMPLATES,
    original_template,
)
from vlmforge_recipes.output_head import choose_head
from vlmforge_recipes.spliced_vlm import Geometry, Names, Prompting, assemble
from vlmforge_recipes.tower_choice import refuse_tower_options

# What the names of each part begin with: as published, and as transformers 4.5x and 5.x save them.
# They do not change together, so each is looked for by itself.
_TEXT = ("language_model.model.", "model.language_model.")
_HEAD = ("language_model.lm_head.", "lm_head.")
_VISION = tuple(f"{a}vision_tower.{b}" for a in ("", "model.") for b in ("vision_model.", ""))
_PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")
_NEWLINE = ("", "model.")

# What both configuration classes mean by no vision_config.
_DEFAULT_TOWER: Mapping[str, object] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True, slots=True)
class _Features:
    layer: int
    keep_class_token: bool


def load_hf(checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
    """Understand a checkpoint of this layout (CheckpointError otherwise)."""
    text, kind = _text(config), _kind(config)
    _check(config)
    refuse_tower_options(options)
    tower = _tower(config)
    image = _image_policy(checkpoint, config, tower)
    store = open_store(checkpoint, options.note)
    names = _names(store, checkpoint, config, options, newline=image.tiling is not None)
    tokenizer = with_end_ids(convert_tokenizer(checkpoint), checkpoint, text)
    return assemble(
        Geometry(
            read_decoder_config(text, session_len=options.session_len, kind=kind),
            tower,
            trained_length(text, kind=kind),
            config.str("projector_hidden_act", "gelu"),
            layout_of(config) or "",
        ),
        names,
        store,
        image,
        tokenizer,
        Prompting(
            _template(checkpoint, config, tokenizer),
            PLACEHOLDER,
            "inline_token",
            _image_token(config, tokenizer),
            TEMPLATES,
        ),
        options,
        extra_files=(),
        unused=unused_in_tower(_vision(config), tower, prefix=names.vision),
    )


def _vision(config: ConfigReader) -> ConfigReader:
    if config.has("vision_config"):
        return config.section("vision_config")
    return ConfigReader(_DEFAULT_TOWER, config.file)


def _tower(config: ConfigReader) -> VisionConfig:
    features = _features(config)
    return read_tower_config(
        _vision(config),
        feature_layer=features.layer,
        keep_class_token=features.keep_class_token,
    )


def _image_policy(checkpoint: Path, config: ConfigReader, tower: VisionConfig) -> ImagePolicy:
    policy = read_image_policy(checkpoint, image_size=tower.image_size, pad_to_square=False)
    if layout_of(config) != HF_ANYRES:
        return policy
    return hf_tiling(policy, tower, config, find_processor(checkpoint))


def _kind(config: ConfigReader) -> str:
    return _text(config).str("model_type", "llama")


def _check(config: ConfigReader) -> None:
    if (kind := _kind(config)) not in TEXT_DEFAULTS:
        expected = " or ".join(repr(name) for name in TEXT_DEFAULTS)
        raise _unsupported(config, f"text_config.model_type {kind!r}", expected)
    if not config.bool("multimodal_projector_bias", default=True):
        raise _unsupported(config, "multimodal_projector_bias false", "true")
    tower = (
        config.section("vision_config").str("model_type", "clip_vision_model")
        if (config.has("vision_config"))
        else "clip_vision_model"
    )
    if tower != "clip_vision_model":
        raise _unsupported(config, f"vision_config.model_type {tower!r}", "'clip_vision_model'")


def _unsupported(config: ConfigReader, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{config.file} describes a variant that this recipe does not know.",
        found=found,
        expected=expected,
        fix="choose a published LLaVA checkpoint, or extend the recipe",
    )


def _features(config: ConfigReader) -> _Features:
    if isinstance(config.get("vision_feature_layer"), list):
        raise _unsupported(config, "several vision_feature_layer", "one, such as -2")
    strategy = config.str("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        found = f"vision_feature_select_strategy {strategy!r}"
        raise _unsupported(config, found, "'default' or 'full'")
    layer = config.int("vision_feature_layer", -2, within=limits.FEATURE_LAYER)
    return _Features(layer, strategy == "full")


def _names(
    store: TensorStore,
    checkpoint: Path,
    config: ConfigReader,
    options: RecipeOptions,
    *,
    newline: bool,
) -> Names:
    # Either place counts: transformers 5 saves it at the top, before it was the text model's.
    places = (config, _text(config))
    tied = any(place.bool("tie_word_embeddings", default=False) for place in places)

    def named(prefixes: tuple[str, ...], name: str) -> str:
        _refuse_two(store, checkpoint, tuple(prefix + name for prefix in prefixes))
        for prefix in prefixes:
            if prefix + name in store:
                return prefix
        raise TensorError(
            f"A tensor is not found under any of its names in {checkpoint}.",
            found=", ".join(sorted(store.names())[:3]) + ", ...",
            expected=" or ".join(prefix + name for prefix in prefixes),
            fix="check that config.json belongs to these weight files",
        )

    heads = tuple(f"{prefix}weight" for prefix in _HEAD)
    _refuse_two(store, checkpoint, heads)
    projector = named(_PROJECTOR, "linear_1.weight")
    text = named(_TEXT, "embed_tokens.weight")
    return Names(
        text,
        choose_head(
            store,
            heads,
            f"{text}embed_tokens.weight",
            tied=tied,
            note=options.note,
        ),
        named(_VISION, "embeddings.class_embedding"),
        (f"{projector}linear_1", f"{projector}linear_2"),
        newline=named(_NEWLINE, "image_newline") + "image_newline" if newline else None,
    )


def _refuse_two(store: TensorStore, checkpoint: Path, names: tuple[str, ...]) -> None:
    """Refuse one tensor under two of its names with other values."""
    first, *others = [name for name in names if name in store] or [""]
    for other in others:
        if not same_values(store, first, store, other):
            raise TensorError(
                f"{checkpoint} stores a tensor under two of its names, with other values.",
                found=f"{first} and {other}",
                expected="one of them",
                fix="save the checkpoint again with one version of transformers",
            )


def _template(
    checkpoint: Path, config: ConfigReader, tokenizer: ConvertedTokenizer
) -> ChatTemplate:
    """The checkpoint's own template, where transformers looks for it, in that order."""
    plain = checkpoint / "chat_template.jinja"
    if plain.exists():
        return ChatTemplate("checkpoint", plain.read_text("utf-8"), ())
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        path = checkpoint / name
        if path.exists() and isinstance(text := read_config(path).get("chat_template"), str):
            return ChatTemplate("checkpoint", text, ())
    if layout_of(config) == HF_ANYRES:
        return original_template(_kind(config), tokenizer)
    return ChatTemplate("llava-hf", PUBLISHED_HF_TEMPLATE, ())


def _image_token(config: ConfigReader, tokenizer: ConvertedTokenizer) -> int:
    named = config.opt_int("image_token_index", within=limits.TOKEN)
    if named is None:
        named = config.opt_int("image_token_id", within=limits.TOKEN)
    token = named
    if token is None:
        token = 32000  # the default of both configuration classes
    known = tokenizer.token_id(PLACEHOLDER)
    if known != token:
        raise CheckpointError(
            f"{config.file} and the tokenizer disagree about the image token.",
            found=f"image_token_index {token}, but {PLACEHOLDER!r} is token {known}",
            expected="one id",
            fix="check that the tokenizer files belong to this checkpoint",
        )
    return token


def check_variant(config: ConfigReader) -> None:
    """Refuse variants of this layout that `config.json` tells of (UnsupportedModelError)."""
    _check(config)


def _text(config: ConfigReader) -> ConfigReader:
    if config.has("text_config"):
        return config.section("text_config")
    return ConfigReader({}, config.file)
