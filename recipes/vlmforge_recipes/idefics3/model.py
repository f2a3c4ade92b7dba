"""A checkpoint of the family.

`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration` of transformers are one
model: SigLIP, pixel shuffle and one linear layer, and a decoder of Llama.
"""

from __future__ import annotations

from pathlib import Path

from vlmforge.engine.images.grid_tiles import GridTexts, GridTiles
from vlmforge.engine.prompts import InlineToken, TemplateParts
from vlmforge.errors import CheckpointError
from vlmforge_builder.blocks.vision import ProjectorConfig, VisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.keys import KeyTable, check_keys
from vlmforge_builder.checkpoint.store import TensorStore, open_store
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer, convert_tokenizer
from vlmforge_recipes.clip_images import WHITE, find_processor, read_format
from vlmforge_recipes.config_keys import PROCESSOR, check_files
from vlmforge_recipes.end_ids import with_end_ids
from vlmforge_recipes.idefics3 import architecture_of
from vlmforge_recipes.idefics3.keys import TABLES
from vlmforge_recipes.idefics3.tower import read_tower, tower_weights
from vlmforge_recipes.llama_decoder import read_decoder_config, trained_length
from vlmforge_recipes.named_tokens import image_token_id, named_token
from vlmforge_recipes.output_head import choose_head, is_tied
from vlmforge_recipes.own_template import own_template
from vlmforge_recipes.spliced_vlm import Geometry, Names, Prompting, assemble
from vlmforge_recipes.tower_choice import refuse_tower_options

PLACEHOLDER = "<image>"
_TEXT, _VISION = "model.text_model.", "model.vision_model."
_PROJECTOR = "model.connector.modality_projection.proj"
_IMAGE_TOKEN = 128257  # the default of both configurations
_IMAGE_SEQ_LEN = 169  # of both processors
_LANCZOS, _HALF = 1, (0.5, 0.5, 0.5)  # of both image processors
_FACTORS = range(1, 65)

TEMPLATES = {
    "smolvlm": TemplateParts(
        system="<|im_start|>",
        meta_instruction="",
        eosys="",
        user="User: ",
        eoh="<end_of_utterance>\n",
        assistant="Assistant: ",
        eoa="<end_of_utterance>",
        separator="\n",
        stop_words=("<end_of_utterance>",),
        strip_end=True,
    )
}


def load(checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
    """Understand a checkpoint (CheckpointError otherwise)."""
    check_variant(config)
    refuse_tower_options(options)
    check_files(checkpoint, _tables(config), config)
    text = _section(config, "text_config")
    tower = read_tower(_section(config, "vision_config"))
    projector = _projector(config, tower)
    decoder = read_decoder_config(text, session_len=options.session_len)
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
        text_separator="",
        in_order=True,
    )
    store = open_store(checkpoint, options.note)
    return assemble(
        Geometry(decoder, tower, projector, trained_length(text), architecture_of(config) or ""),
        _names(store, config, tower, options),
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
    check_keys(config, _tables(config))
    read_tower(_section(config, "vision_config"))


def _tables(config: ConfigReader) -> tuple[KeyTable, ...]:
    return TABLES[architecture_of(config) or ""]


def _section(config: ConfigReader, key: str) -> ConfigReader:
    return config.section(key) if config.has(key) else ConfigReader({}, config.file, key)


def _projector(config: ConfigReader, tower: VisionConfig) -> ProjectorConfig:
    factor = config.int("scale_factor", 2, within=_FACTORS)
    side = tower.image_size // tower.patch_size
    if side % factor:
        raise CheckpointError(
            f"{config.file} does not fit itself.",
            found=f"scale_factor {factor}, and {side} x {side} patches",
            expected="a factor that divides the patches of a line",
            fix="check config.json against the published one",
        )
    return ProjectorConfig(None, factor)


def _check_count(checkpoint: Path, rows: int) -> None:
    """The processor counts a view's tokens by a number of its own."""
    path = checkpoint / PROCESSOR
    reader = read_config(path) if path.exists() else ConfigReader({}, path)
    found = reader.int("image_seq_len", _IMAGE_SEQ_LEN)
    if found != rows:
        raise CheckpointError(
            f"{path} does not fit the vision tower.",
            found=f"image_seq_len {found}",
            expected=f"{rows}, the rows of a view",
            fix="check that the file belongs to this checkpoint",
        )


def _image_policy(
    checkpoint: Path,
    processor: ConfigReader,
    tokenizer: ConvertedTokenizer,
    tower: VisionConfig,
    projector: ProjectorConfig,
) -> GridTiles:
    tile = _longest_edge(processor, "max_image_size", 364)
    if tile != tower.image_size:
        raise CheckpointError(
            f"The image processor of {processor.file} does not fit the vision tower.",
            found=f"max_image_size {tile}",
            expected=f"{tower.image_size}, the tower's image_size",
            fix="check that the file belongs to this checkpoint",
        )
    fake = named_token(checkpoint, tokenizer, "fake_image_token", "<fake_token_around_image>")
    whole = named_token(checkpoint, tokenizer, "global_image_token", "<global-img>")
    return GridTiles(
        read_format(processor, resample=_LANCZOS, mean=_HALF, std=_HALF, background=WHITE),
        tile=tile,
        longest_edge=_longest_edge(processor, "size", 4 * 364),
        splits=processor.bool("do_image_splitting", default=True),
        view_tokens=projector.rows(tower),
        texts=GridTexts(
            tile=f"{fake}<row_{{row}}_col_{{column}}>",
            line="\n",
            whole=f"\n{fake}{whole}",
            alone=f"{fake}{whole}",
            end=fake,
        ),
    )


def _longest_edge(processor: ConfigReader, key: str, default: int) -> int:
    if not processor.has(key):
        return default
    section = processor.section(key)
    if [name for name, value in section.values.items() if value is not None] != ["longest_edge"]:
        raise CheckpointError(
            f"{processor.file} has a wrong {key}.",
            found=repr(processor.get(key))[:80],
            expected=f'{{"longest_edge": {default}}}',
            fix="check the file against the published one",
        )
    return section.int("longest_edge", within=limits.PIXELS)


def _names(
    store: TensorStore, config: ConfigReader, tower: VisionConfig, options: RecipeOptions
) -> Names:
    head = choose_head(
        store,
        ("lm_head.weight",),
        f"{_TEXT}embed_tokens.weight",
        tied=is_tied(config, default=False),
        note=options.note,
    )
    return Names(_TEXT, head, tower_weights(tower, _VISION), (_PROJECTOR,))
