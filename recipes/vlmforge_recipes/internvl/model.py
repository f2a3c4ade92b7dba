"""A checkpoint of the family (`InternVLForConditionalGeneration` of transformers).

InternViT, pixel unshuffle, a norm and two linear layers, and a decoder of Qwen2, Qwen3 or Llama.
"""

from __future__ import annotations

from pathlib import Path

from vlmforge.engine.images.aspect_tiles import AspectTiles
from vlmforge.engine.prompts import InlineToken
from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.blocks.layers import ACTIVATIONS
from vlmforge_builder.blocks.vision import ProjectorConfig, VisionConfig
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.keys import KeyTable, check_keys
from vlmforge_builder.checkpoint.store import TensorStore, open_store
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer, convert_tokenizer
from vlmforge_recipes.chatml import chatml
from vlmforge_recipes.clip_images import WHITE, check_fit, find_processor, read_box, read_format
from vlmforge_recipes.config_keys import PROCESSOR, check_files
from vlmforge_recipes.end_ids import with_end_ids
from vlmforge_recipes.internvl import ARCHITECTURE
from vlmforge_recipes.internvl.keys import TABLES
from vlmforge_recipes.internvl.tower import read_tower, tower_weights
from vlmforge_recipes.llama_decoder import read_decoder_config, trained_length
from vlmforge_recipes.named_tokens import image_token_id, named_token
from vlmforge_recipes.output_head import choose_head, is_tied
from vlmforge_recipes.own_template import own_template
from vlmforge_recipes.spliced_vlm import Geometry, Names, Prompting, assemble
from vlmforge_recipes.tensor_names import find_prefix
from vlmforge_recipes.tower_choice import refuse_tower_options

PLACEHOLDER = "<IMG_CONTEXT>"
# What the names of each part begin with: as published, and as in memory.
_TEXT = ("language_model.model.", "model.language_model.")
_HEADS = ("language_model.lm_head.weight", "lm_head.weight")
_VISION = ("vision_tower.", "model.vision_tower.")
_PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")
_IMAGE_TOKEN = 151667  # the default of `InternVLConfig`
# `nn.LayerNorm`'s default, which the projector keeps.
_PROJECTOR_NORM_EPS = 1e-5
_MOST_TILES = range(1, 257)

TEMPLATES = {"chatml": chatml(None)}


def load(checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
    """Understand a checkpoint (CheckpointError otherwise)."""
    check_variant(config)
    refuse_tower_options(options)
    check_files(checkpoint, _tables(config), config)
    text, kind = _text(config), _kind(config)
    tower = read_tower(_section(config, "vision_config"))
    projector = _projector(config, tower)
    decoder = read_decoder_config(text, session_len=options.session_len, kind=kind)
    processor = find_processor(checkpoint, _tables(config), config)
    _check_count(checkpoint, projector.rows(tower))
    tokenizer = with_end_ids(convert_tokenizer(checkpoint), checkpoint, config, text)
    image = _image_policy(checkpoint, processor, tokenizer, tower, projector)
    prompting = Prompting(
        own_template(checkpoint),
        PLACEHOLDER,
        InlineToken(),
        image_token_id(config, tokenizer, PLACEHOLDER, _IMAGE_TOKEN),
        TEMPLATES,
        image_line="{image}\n",
        text_separator="",
        in_order=True,
    )
    store = open_store(checkpoint, options.note)
    return assemble(
        Geometry(decoder, tower, projector, trained_length(text, kind=kind), ARCHITECTURE),
        _names(store, checkpoint, config, tower, options),
        store,
        image,
        tokenizer,
        prompting,
        options,
        extra_files=(),
        unused=(),
    )


def check_variant(config: ConfigReader) -> None:
    """Refuse variants that `config.json` tells of (UnsupportedModelError)."""
    if (kind := _kind(config)) not in TABLES:
        expected = " or ".join(repr(name) for name in TABLES)
        raise _unsupported(config, f"text_config.model_type {kind!r}", expected)
    if (act := config.str("projector_hidden_act", "gelu")) not in ACTIVATIONS:
        expected = ", ".join(sorted(ACTIVATIONS))
        raise _unsupported(config, f"projector_hidden_act {act!r}", expected)
    check_keys(config, _tables(config))
    read_tower(_section(config, "vision_config"))


def _tables(config: ConfigReader) -> tuple[KeyTable, ...]:
    return TABLES[_kind(config)]


def _kind(config: ConfigReader) -> str:
    return _text(config).str("model_type", "qwen2")


def _text(config: ConfigReader) -> ConfigReader:
    return _section(config, "text_config")


def _section(config: ConfigReader, key: str) -> ConfigReader:
    return config.section(key) if config.has(key) else ConfigReader({}, config.file, key)


def _projector(config: ConfigReader, tower: VisionConfig) -> ProjectorConfig:
    ratio = config.float("downsample_ratio", 0.5, within=(1 / 64, 1.0))
    shuffle = round(1 / ratio)
    side = tower.image_size // tower.patch_size
    if 1 / ratio != shuffle or side % shuffle:
        raise CheckpointError(
            f"{config.file} does not fit itself.",
            found=f"downsample_ratio {ratio}, and {side} x {side} patches",
            expected="one part of a whole, such as 0.5, that divides the patches of a line",
            fix="check config.json against the published one",
        )
    return ProjectorConfig(
        config.str("projector_hidden_act", "gelu"), shuffle, input_norm_eps=_PROJECTOR_NORM_EPS
    )


def _check_count(checkpoint: Path, rows: int) -> None:
    """The processor counts a view's tokens by a number of its own."""
    path = checkpoint / PROCESSOR
    found = read_config(path).int("image_seq_length", 256) if path.exists() else 256
    if found != rows:
        raise CheckpointError(
            f"{path} does not fit the vision tower.",
            found=f"image_seq_length {found}",
            expected=f"{rows}, the rows of a view",
            fix="check that the file belongs to this checkpoint",
        )


def _image_policy(
    checkpoint: Path,
    processor: ConfigReader,
    tokenizer: ConvertedTokenizer,
    tower: VisionConfig,
    projector: ProjectorConfig,
) -> AspectTiles:
    box = read_box(processor, "size") or (384, 384)  # the default of the image processor
    check_fit(processor, "size", box, box, (tower.image_size, tower.image_size))
    least = processor.int("min_patches", 1, within=_MOST_TILES)
    most = processor.int("max_patches", 12, within=_MOST_TILES)
    if least > most:
        raise CheckpointError(
            f"{processor.file} does not fit itself.",
            found=f"min_patches {least}, max_patches {most}",
            expected="min_patches of at most max_patches",
            fix="check the file against the published one",
        )
    return AspectTiles(
        read_format(processor, background=WHITE),
        tile=tower.image_size,
        # Of one tile at most the processor makes no grid.
        least=least if most > 1 else 1,
        most=most,
        view_tokens=projector.rows(tower),
        begin=named_token(checkpoint, tokenizer, "start_image_token", "<img>"),
        end=named_token(checkpoint, tokenizer, "end_image_token", "</img>"),
    )


def _names(
    store: TensorStore,
    checkpoint: Path,
    config: ConfigReader,
    tower: VisionConfig,
    options: RecipeOptions,
) -> Names:
    text = find_prefix(store, checkpoint, _TEXT, "embed_tokens.weight")
    projector = find_prefix(store, checkpoint, _PROJECTOR, "linear_1.weight")
    head = choose_head(
        store,
        _HEADS,
        f"{text}embed_tokens.weight",
        tied=is_tied(config, default=True),
        note=options.note,
    )
    return Names(
        text,
        head,
        tower_weights(tower, find_prefix(store, checkpoint, _VISION, "embeddings.cls_token")),
        (f"{projector}linear_1", f"{projector}linear_2"),
        {0: f"{projector}layer_norm"},
    )


def _unsupported(config: ConfigReader, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{config.file} describes a variant that this recipe does not know.",
        found=found,
        expected=expected,
        fix="choose a published checkpoint of up to 14B, or extend the recipe",
    )
