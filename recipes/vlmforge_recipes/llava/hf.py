"""The layout of transformers.

`LlavaForConditionalGeneration` (v1.5) and `LlavaNextForConditionalGeneration` (v1.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.prompts import InlineToken
from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.blocks.layers import ACTIVATIONS
from vlmforge_builder.blocks.vision import ProjectorConfig, VisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.chat_template import read_chat_template
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.keys import KeyTable, check_keys
from vlmforge_builder.checkpoint.store import TensorStore, open_store
from vlmforge_builder.recipe import ChatTemplate, ModelSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer, convert_tokenizer
from vlmforge_builder.weights import Weight
from vlmforge_recipes.clip_images import find_processor, read_image_policy
from vlmforge_recipes.clip_tower import read_tower_config, tower_weights, unused_in_tower
from vlmforge_recipes.config_keys import PROCESSOR, check_files
from vlmforge_recipes.end_ids import with_end_ids
from vlmforge_recipes.llama_decoder import read_decoder_config, trained_length
from vlmforge_recipes.llava.anyres import hf_anyres
from vlmforge_recipes.llava.keys import LAYOUTS
from vlmforge_recipes.llava.layout import HF_ANYRES, layout_of
from vlmforge_recipes.llava.templates import (
    PLACEHOLDER,
    PUBLISHED_HF_TEMPLATE,
    TEMPLATES,
    original_template,
)
from vlmforge_recipes.output_head import choose_head, is_tied
from vlmforge_recipes.spliced_vlm import Geometry, Names, Prompting, assemble
from vlmforge_recipes.tensor_names import find_prefix, refuse_two
from vlmforge_recipes.tower_choice import refuse_tower_options

# What the names of each part begin with: as published, and as transformers 4.5x and 5.x save them.
# They do not change together, so each is looked for by itself.
_TEXT = ("language_model.model.", "model.language_model.")
_HEAD = ("language_model.lm_head.", "lm_head.")
_VISION = tuple(f"{a}vision_tower.{b}" for a in ("", "model.") for b in ("vision_model.", ""))
_PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")
_NEWLINE, _ROW = ("", "model."), "image_newline"

# What both configuration classes mean by no vision_config.
_DEFAULT_TOWER: Mapping[str, object] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


# Decoders of the published checkpoints, by `model_type`.
_KINDS = ("llama", "mistral")

# What a processor must know for counting the tokens of an image by itself.
_COUNTS = ("patch_size", "vision_feature_select_strategy")


@dataclass(frozen=True, slots=True)
class _Features:
    layer: int
    keep_class_token: bool


def load_hf(checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
    """Understand a checkpoint of this layout (CheckpointError otherwise)."""
    text, kind = _text(config), _kind(config)
    _check(config)
    refuse_tower_options(options)
    check_files(checkpoint, _tables(config), config)
    tower = _tower(config)
    image = _image_policy(checkpoint, config, tower)
    store = open_store(checkpoint, options.note)
    vision = find_prefix(store, checkpoint, _VISION, "embeddings.class_embedding")
    names = _names(store, checkpoint, config, options, tower_weights(tower, prefix=vision))
    tokenizer = with_end_ids(convert_tokenizer(checkpoint), checkpoint, config, text)
    return assemble(
        Geometry(
            read_decoder_config(text, session_len=options.session_len, kind=kind),
            tower,
            ProjectorConfig(config.str("projector_hidden_act", "gelu")),
            trained_length(text, kind=kind),
            layout_of(config) or "",
        ),
        names,
        store,
        image,
        tokenizer,
        Prompting(
            _template(checkpoint, config, tokenizer),
            PLACEHOLDER,
            InlineToken(),
            _image_token(config, tokenizer),
            TEMPLATES,
        ),
        options,
        extra_files=(),
        unused=unused_in_tower(_vision(config), tower, prefix=vision),
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
    processor = find_processor(checkpoint, _tables(config), config)
    if (path := checkpoint / PROCESSOR).exists():
        _check_counts(read_config(path), tower)
    if layout_of(config) == HF_ANYRES:
        return hf_anyres(processor, tower, config)
    return read_image_policy(processor, image_size=tower.image_size, pad_to_square=False)


def _check_counts(processor: ConfigReader, tower: VisionConfig) -> None:
    """The processor of transformers counts an image's tokens by numbers of its own.

    Versions 4.45 to 4.57 write null for those that the processor was made without: the model then
    counts (`legacy` of `LlavaProcessor.__call__`), and the other numbers are of no use.
    """
    if any(processor.get(key) is None for key in _COUNTS):
        return
    patch = processor.int("patch_size")
    more = processor.int("num_additional_image_tokens", 1)
    strategy = processor.str("vision_feature_select_strategy")
    side = tower.image_size // patch if patch > 0 else 0
    tokens = side**2 + more - (strategy == "default")
    if (side, tokens) != (tower.image_size // tower.patch_size, tower.tokens):
        raise CheckpointError(
            f"{processor.file} does not fit the vision tower.",
            found=f"patch_size {patch}, num_additional_image_tokens {more} and "
            f"vision_feature_select_strategy {strategy!r}: {tokens} tokens an image",
            expected=f"{tower.tokens} tokens, patches of {tower.patch_size}",
            fix="check that the file belongs to this checkpoint",
        )


def _tables(config: ConfigReader) -> tuple[KeyTable, ...]:
    return LAYOUTS[layout_of(config) or "", _kind(config)]


def _kind(config: ConfigReader) -> str:
    return _text(config).str("model_type", "llama")


def _check(config: ConfigReader) -> None:
    if (kind := _kind(config)) not in _KINDS:
        expected = " or ".join(repr(name) for name in _KINDS)
        raise _unsupported(config, f"text_config.model_type {kind!r}", expected)
    if (act := config.str("projector_hidden_act", "gelu")) not in ACTIVATIONS:
        expected = ", ".join(sorted(ACTIVATIONS))
        raise _unsupported(config, f"projector_hidden_act {act!r}", expected)
    check_keys(config, _tables(config))


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
    strategy = _strategy(config)
    if strategy not in ("default", "full"):
        found = f"vision_feature_select_strategy {strategy!r}"
        raise _unsupported(config, found, "'default' or 'full'")
    layer = config.int("vision_feature_layer", -2, within=limits.FEATURE_LAYER)
    return _Features(layer, strategy == "full")


def _strategy(config: ConfigReader) -> str:
    return config.str("vision_feature_select_strategy", "default")


def _names(
    store: TensorStore,
    checkpoint: Path,
    config: ConfigReader,
    options: RecipeOptions,
    tower: Mapping[str, Weight],
) -> Names:
    def named(prefixes: tuple[str, ...], name: str) -> str:
        return find_prefix(store, checkpoint, prefixes, name)

    heads = tuple(f"{prefix}weight" for prefix in _HEAD)
    refuse_two(store, checkpoint, heads)
    projector = named(_PROJECTOR, "linear_1.weight")
    text = named(_TEXT, "embed_tokens.weight")
    return Names(
        text,
        choose_head(
            store,
            heads,
            f"{text}embed_tokens.weight",
            tied=is_tied(config, default=False),
            note=options.note,
        ),
        tower,
        (f"{projector}linear_1", f"{projector}linear_2"),
        newline=f"{named(_NEWLINE, _ROW)}{_ROW}" if layout_of(config) == HF_ANYRES else None,
    )


def _template(
    checkpoint: Path, config: ConfigReader, tokenizer: ConvertedTokenizer
) -> ChatTemplate:
    """The checkpoint's own template, or the one that was published without a file."""
    if (text := read_chat_template(checkpoint)) is not None:
        return ChatTemplate("checkpoint", text, ())
    if layout_of(config) == HF_ANYRES:
        return original_template(_kind(config), tokenizer)
    return ChatTemplate("llava-hf", PUBLISHED_HF_TEMPLATE, ())


def _image_token(config: ConfigReader, tokenizer: ConvertedTokenizer) -> int:
    # Two names of one key; 32000 is the default of both configuration classes.
    keys = ("image_token_index", "image_token_id")
    named = [config.opt_int(key, within=limits.TOKEN) for key in keys]
    given = [token for token in named if token is not None] or [32000]
    token = given[0]
    known = tokenizer.token_id(PLACEHOLDER)
    if any(known != token for token in given):
        raise CheckpointError(
            f"{config.file} and the tokenizer disagree about the image token.",
            found=f"image_token_index {' and '.join(map(str, given))}, but {PLACEHOLDER!r} is "
            f"token {known}",
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
