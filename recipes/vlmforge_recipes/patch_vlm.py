"""What families share whose vision tower takes patches and whose places have axes: the assembly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmforge.engine.images.patches import Patches
from vlmforge.engine.manifest import KVLayout
from vlmforge.engine.positions.axes import Axes
from vlmforge.engine.prompts import InlineToken, PromptPolicy, TemplateParts
from vlmforge.errors import CheckpointError
from vlmforge_builder.blocks.decoder import DecoderConfig, inverse_frequencies
from vlmforge_builder.blocks.patch_vision import PatchVisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.store import TensorStore
from vlmforge_builder.recipe import ChatTemplate, ModelSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer, convert_tokenizer
from vlmforge_recipes.chatml import chatml
from vlmforge_recipes.end_ids import with_end_ids
from vlmforge_recipes.llama_decoder import decoder_part, rope_section
from vlmforge_recipes.output_head import choose_head
from vlmforge_recipes.own_template import own_template
from vlmforge_recipes.patch_tower import TowerNames, patch_vision_part

PLACEHOLDER = "<|image_pad|>"
AROUND = ("<|vision_start|>", "<|vision_end|>")
_HEAD = "lm_head.weight"

TEMPLATES: Mapping[str, TemplateParts] = {
    # LMDeploy's parts of this name.
    "qwen": chatml("You are a helpful assistant."),
}


@dataclass(frozen=True, slots=True)
class Understood:
    """A configuration, read.

    Attributes:
        architecture: Its name.
        text: The section of the decoder; `config` is the whole file.
        decoder, tower, image: Geometry and pixels.
        trained: Tokens of the longest sequence in training.
        axes: See `Axes`.
        names: Of the tower's tensors.
        prefixes: What the names of the decoder's tensors begin with, and those of the tower; the
            first that the checkpoint has.
    """

    architecture: str
    config: ConfigReader
    text: ConfigReader
    decoder: DecoderConfig
    tower: PatchVisionConfig
    image: Patches
    trained: int
    axes: tuple[int, ...]
    names: TowerNames
    prefixes: tuple[tuple[str, ...], tuple[str, ...]]


def read_sections(
    text: ConfigReader, head_dim: int, default: tuple[int, int, int]
) -> tuple[int, ...]:
    """How many frequencies each axis has (`mrope_section`): three numbers, half of a head in all.

    Raises:
        CheckpointError: other ones.
    """
    scaling = rope_section(text)
    found = None if scaling is None else scaling.get("mrope_section")
    sections = list(default) if found is None else whole_numbers(found)
    if len(sections) != len(default) or sum(sections) != head_dim // 2:
        raise CheckpointError(
            f"{text.file} has a wrong mrope_section.",
            found=repr(found)[:80],
            expected=f"three whole numbers whose sum is {head_dim // 2}, half of a head",
            fix=f"check {text.file.name} against the published one",
        )
    return tuple(sections)


def whole_numbers(value: object) -> list[int]:
    """The items of a list of whole numbers >= 0; empty: it is none."""
    items = value if isinstance(value, list) else []
    numbers = [item for item in items if type(item) is int and item >= 0]
    return numbers if len(numbers) == len(items) else []


def in_sections(sections: Sequence[int]) -> tuple[int, ...]:
    """Axes of the frequencies, one section after the other."""
    return tuple(axis for axis, count in enumerate(sections) for _ in range(count))


def interleaved(sections: Sequence[int]) -> tuple[int, ...]:
    """Axes of the frequencies, in turn as long as an axis has some left; time has the rest."""
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for place in range(axis, min(3 * sections[axis], len(axes)), 3):
            axes[place] = axis
    return tuple(axes)


def is_tied(config: ConfigReader, text: ConfigReader) -> bool:
    """`tie_word_embeddings`, wherever it says so."""
    return any(place.bool("tie_word_embeddings", default=False) for place in (config, text))


def assemble(
    found: Understood, checkpoint: Path, store: TensorStore, options: RecipeOptions
) -> ModelSpec:
    """Put parts and policies together (CheckpointError: files that do not fit each other)."""
    decoder, image = found.decoder, found.image
    text, vision = (
        next((p for p in prefixes if p + probe in store), prefixes[0])
        for prefixes, probe in zip(
            found.prefixes, ("embed_tokens.weight", "patch_embed.proj.weight"), strict=True
        )
    )
    head = choose_head(
        *(store, (_HEAD,), f"{text}embed_tokens.weight"),
        tied=is_tied(found.config, found.text),
        note=options.note,
    )
    tokenizer = with_end_ids(convert_tokenizer(checkpoint), checkpoint, found.config, found.text)
    _check_tokens(found, tokenizer)
    template = own_template(checkpoint)
    return ModelSpec(
        architecture=found.architecture,
        parts=(
            patch_vision_part(found.tower, image, found.names, vision),
            decoder_part(decoder, prefix=text, head=head),
        ),
        store=store,
        image=image,
        template=template,
        prompt=_prompt(tokenizer, template, found.config),
        tokenizer_json=tokenizer.json,
        tokenizer_proof=str(tokenizer.proof),
        kv=KVLayout(decoder.layers, decoder.kv_heads, decoder.head_dim, "float32", None),
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        eos_ids=tokenizer.eos_ids,
        tokens_per_image=image.most_tokens(0),
        session_len=decoder.max_positions,
        trained_len=found.trained,
        source_files=(),
        positions=Axes(found.trained, inverse_frequencies(decoder), found.axes),
        feature_layers=decoder.feature_layers,
    )


def check_width(vision: ConfigReader, width: int, hidden: int) -> None:
    """What the tower gives must be as wide as an embedding (CheckpointError otherwise)."""
    if width != hidden:
        raise CheckpointError(
            f"{vision.file} does not fit itself.",
            found=f"a vision tower whose features are {width} wide",
            expected=f"the decoder's hidden_size, {hidden}",
            fix=f"check {vision.file.name} against the published one",
        )


def outside(decoder: DecoderConfig, feature_layers: int = 1) -> DecoderConfig:
    """The decoder with its tokens turned by what it is given."""
    return dataclasses.replace(decoder, turned_outside=True, feature_layers=feature_layers)


def _prompt(
    tokenizer: ConvertedTokenizer, template: ChatTemplate, config: ConfigReader
) -> PromptPolicy:
    begin, end = AROUND
    return PromptPolicy(
        template_name=template.name,
        template_file="chat_template.jinja",
        stop_words=template.stop_words,
        templates=TEMPLATES,
        image_placeholder=PLACEHOLDER,
        splice=InlineToken(),
        image_token_id=config.int("image_token_id", 151655, within=limits.TOKEN),
        bos_id=tokenizer.bos_id if tokenizer.add_bos else None,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        image_line=f"{begin}{{image}}{end}",
        text_separator="",
        content_tokens=None,
        history_window=None,
        box_format=None,
        in_order=True,
        image_around=AROUND,
    )


def _check_tokens(found: Understood, tokenizer: ConvertedTokenizer) -> None:
    size, config = found.decoder.vocab_size, found.config
    if tokenizer.vocab_size > size or any(token >= size for token in tokenizer.eos_ids):
        raise CheckpointError(
            "The tokenizer has tokens that the decoder has not.",
            found=f"{tokenizer.vocab_size} tokens, eos_token_id {list(tokenizer.eos_ids)}",
            expected=f"ids below vocab_size {size}",
            fix="check that the tokenizer files belong to this checkpoint",
        )
    given = {
        PLACEHOLDER: config.int("image_token_id", 151655, within=limits.TOKEN),
        AROUND[0]: config.int("vision_start_token_id", 151652, within=limits.TOKEN),
        AROUND[1]: config.int("vision_end_token_id", 151653, within=limits.TOKEN),
    }
    for token, wanted in given.items():
        if (known := tokenizer.token_id(token)) != wanted:
            raise CheckpointError(
                f"{config.file} and the tokenizer disagree about the tokens of an image.",
                found=f"{token!r} is token {known}",
                expected=f"token {wanted}, by config.json",
                fix="check that the tokenizer files belong to this checkpoint",
            )
