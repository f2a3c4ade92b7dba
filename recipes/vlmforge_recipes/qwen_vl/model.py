"""A checkpoint of the family: everything is in its shards and its vocabulary file."""

from __future__ import annotations

from pathlib import Path

from vlmforge.engine.manifest import KVLayout
from vlmforge.engine.positions.dynamic_ntk import DynamicNTK
from vlmforge.errors import CheckpointError
from vlmforge.inputs.template import jinja_from_parts
from vlmforge_builder.blocks.decoder import DecoderConfig
from vlmforge_builder.blocks.resampler import ResamplerConfig
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.store import open_store
from vlmforge_builder.recipe import ChatTemplate, ModelSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer
from vlmforge_recipes.cached_decoder import cached_decoder_part
from vlmforge_recipes.config_keys import check_files
from vlmforge_recipes.output_head import choose_head
from vlmforge_recipes.qwen_vl.decoder import (
    EMBEDDING,
    decoder_weights,
    longest,
    read_decoder_config,
)
from vlmforge_recipes.qwen_vl.keys import TABLES
from vlmforge_recipes.qwen_vl.layout import ARCHITECTURE, check
from vlmforge_recipes.qwen_vl.prompting import (
    DEFAULT,
    IMAGE_LINE,
    PLACEHOLDER,
    TEMPLATES,
    prompt_policy,
    read_tokenizer,
    stop_ids,
)
from vlmforge_recipes.qwen_vl.vision import (
    image_policy,
    read_resampler_config,
    read_tower_config,
    vision_part,
)
from vlmforge_recipes.tower_choice import refuse_tower_options


def load(checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
    """Understand a checkpoint (CheckpointError otherwise)."""
    check(config)
    refuse_tower_options(options)
    check_files(checkpoint, TABLES, config)
    visual = config.section("visual")
    decoder = read_decoder_config(config, session_len=options.session_len)
    tower, resampler = read_tower_config(visual), read_resampler_config(visual)
    tokenizer = read_tokenizer(checkpoint, visual)
    _check_sizes(config, decoder, resampler, tokenizer)
    template = TEMPLATES[DEFAULT]
    store = open_store(checkpoint, options.note)
    head = choose_head(
        store,
        ("lm_head.weight",),
        EMBEDDING,
        tied=config.bool("tie_word_embeddings", default=False),
        note=options.note,
    )
    return ModelSpec(
        architecture=ARCHITECTURE,
        parts=(
            vision_part(tower, resampler),
            cached_decoder_part(decoder, decoder_weights(decoder, head=head)),
        ),
        store=store,
        image=image_policy(tower),
        template=ChatTemplate(
            DEFAULT, jinja_from_parts(template, PLACEHOLDER, IMAGE_LINE), template.stop_words
        ),
        prompt=prompt_policy(checkpoint, visual, tokenizer),
        tokenizer_json=tokenizer.json,
        tokenizer_proof=str(tokenizer.proof),
        kv=KVLayout(decoder.layers, decoder.kv_heads, decoder.head_dim, "float32", None),
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        eos_ids=stop_ids(checkpoint, tokenizer),
        tokens_per_image=resampler.queries,
        session_len=decoder.max_positions,
        trained_len=longest(config),
        source_files=(),
        positions=_positions(decoder),
    )


def _positions(decoder: DecoderConfig) -> DynamicNTK:
    context = decoder.long_context
    assert context is not None
    levels = context.levels(decoder.max_positions)
    return DynamicNTK(context.trained_length, levels)


def _check_sizes(
    config: ConfigReader,
    decoder: DecoderConfig,
    resampler: ResamplerConfig,
    tokenizer: ConvertedTokenizer,
) -> None:
    sizes = (
        ("visual.output_dim", resampler.width, decoder.hidden_size, "hidden_size"),
        ("the tokenizer's size", tokenizer.vocab_size, decoder.vocab_size, "vocab_size"),
    )
    for what, found, limit, name in sizes:
        if found > limit or (what.startswith("visual") and found != limit):
            raise CheckpointError(
                f"{config.file} does not fit itself or the tokenizer beside it.",
                found=f"{what} {found}",
                expected=f"{name} {limit}",
                fix="check that the files belong to one checkpoint",
            )
