"""LLaVA 1.5 in the layout of transformers (`LlavaForConditionalGeneration`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmforge.errors import CheckpointError, TensorError, UnsupportedModelError
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.store import TensorStore, open_store
from vlmforge_builder.recipe import ChatTemplate, ModelSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer, convert_tokenizer
from vlmforge_recipes.clip_images import read_image_policy
from vlmforge_recipes.clip_tower import read_tower_config
from vlmforge_recipes.llama_decoder import read_decoder_config, trained_length
from vlmforge_recipes.llava.layout import HF
from vlmforge_recipes.llava.templates import PLACEHOLDER, PUBLISHED_HF_TEMPLATE, TEMPLATES
from vlmforge_recipes.spliced_vlm import Geometry, Names, Prompting, assemble

ARCHITECTURE = HF

# What the tensors of the four parts are called: as published, by transformers 4.5x, and by 5.x.
_LAYOUTS = (
    Names(
        "language_model.model.",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.",
        ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    ),
    Names(
        "model.language_model.",
        "lm_head.weight",
        "model.vision_tower.vision_model.",
        ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    ),
    Names(
        "model.language_model.",
        "lm_head.weight",
        "model.vision_tower.",
        ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    ),
)
# `LlavaConfig` without a vision_config means this tower.
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
    text = _text(config)
    _check(config, text)
    features = _features(config)
    vision = (
        config.section("vision_config")
        if config.has("vision_config")
        else ConfigReader(_DEFAULT_TOWER, config.file)
    )
    decoder = read_decoder_config(text, session_len=options.session_len)
    tower = read_tower_config(
        vision, feature_layer=features.layer, keep_class_token=features.keep_class_token
    )
    store = open_store(checkpoint)
    names = _names(store, checkpoint)
    tied = config.bool("tie_word_embeddings", default=False) or text.bool(
        "tie_word_embeddings", default=False
    )
    if tied:
        names = names.tied()
    tokenizer = convert_tokenizer(checkpoint)
    return assemble(
        Geometry(
            decoder,
            tower,
            trained_length(text),
            config.str("projector_hidden_act", "gelu"),
            ARCHITECTURE,
        ),
        names,
        store,
        read_image_policy(checkpoint, image_size=tower.image_size, pad_to_square=False),
        tokenizer,
        Prompting(
            _template(checkpoint),
            PLACEHOLDER,
            "inline_token",
            _image_token(config, tokenizer),
            TEMPLATES,
        ),
        options,
        extra_files=(),
    )


def _check(config: ConfigReader, text: ConfigReader) -> None:
    kind = text.str("model_type", "llama")
    if kind != "llama":
        raise _unsupported(config, f"text_config.model_type {kind!r}", "'llama'")
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
        fix="choose a LLaVA 1.5 checkpoint, or extend the recipe",
    )


def _features(config: ConfigReader) -> _Features:
    if isinstance(config.get("vision_feature_layer"), list):
        raise _unsupported(config, "several vision_feature_layer", "one, such as -2")
    strategy = config.str("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        found = f"vision_feature_select_strategy {strategy!r}"
        raise _unsupported(config, found, "'default' or 'full'")
    return _Features(config.int("vision_feature_layer", -2), strategy == "full")


def _names(store: TensorStore, checkpoint: Path) -> Names:
    for names in _LAYOUTS:
        wanted = f"{names.vision}embeddings.class_embedding"
        if f"{names.text}embed_tokens.weight" in store and wanted in store:
            return names
    raise TensorError(
        f"The tensors of {checkpoint} have names of no known layout.",
        found=", ".join(sorted(store.names())[:3]) + ", ...",
        expected="names that begin with " + " or ".join(n.text for n in _LAYOUTS[:2]),
        fix="check that config.json belongs to these weight files",
    )


def _template(checkpoint: Path) -> ChatTemplate:
    """The checkpoint's own template, where transformers looks for it, in that order."""
    plain = checkpoint / "chat_template.jinja"
    if plain.exists():
        return ChatTemplate("checkpoint", plain.read_text("utf-8"), ())
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        path = checkpoint / name
        if path.exists() and isinstance(text := read_config(path).get("chat_template"), str):
            return ChatTemplate("checkpoint", text, ())
    return ChatTemplate("llava-hf", PUBLISHED_HF_TEMPLATE, ())


def _image_token(config: ConfigReader, tokenizer: ConvertedTokenizer) -> int:
    named = config.opt_int("image_token_index")
    token = named if named is not None else config.opt_int("image_token_id")
    if token is None:
        token = 32000  # the default of LlavaConfig
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
    _check(config, _text(config))


def _text(config: ConfigReader) -> ConfigReader:
    if config.has("text_config"):
        return config.section("text_config")
    return ConfigReader({}, config.file)
