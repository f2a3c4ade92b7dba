"""What families share whose image features take the place of token embeddings: the assembly.

A vision tower, a projector and a decoder become parts and policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.interface import VisionInterface
from vlmforge.engine.manifest import KVLayout
from vlmforge.engine.positions.absolute import Absolute
from vlmforge.engine.prompts import PromptPolicy, Splice, TemplateParts
from vlmforge.errors import CheckpointError
from vlmforge_builder.blocks.decoder import DecoderConfig, inverse_frequencies
from vlmforge_builder.blocks.vision import ProjectorConfig, VisionConfig, VisionEncoder
from vlmforge_builder.checkpoint.store import TensorStore
from vlmforge_builder.recipe import ChatTemplate, ModelSpec, PartSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer
from vlmforge_builder.weights import Stored, Weight
from vlmforge_recipes.clip_tower import linear, norm
from vlmforge_recipes.llama_decoder import decoder_part


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the model."""

    decoder: DecoderConfig
    tower: VisionConfig
    projector: ProjectorConfig
    trained_len: int
    architecture: str


@dataclass(frozen=True, slots=True)
class Names:
    """What the checkpoint's tensors are called.

    Attributes:
        text: What the names of the decoder's begin with.
        head: The whole name of the output projection's.
        tower: The tower's weights by our names, without "tower." before them.
        projector: Its linear layers.
        projector_norms: Its layer normalisations by our numbers: 0 before all, 1 and 2 behind the
            linear layers.
        newline: The whole name of the row that ends each line of an image, where one is used.
    """

    text: str
    head: str
    tower: Mapping[str, Weight]
    projector: tuple[str, ...]
    projector_norms: Mapping[int, str] = field(default_factory=dict)
    newline: str | None = None


@dataclass(frozen=True, slots=True)
class Prompting:
    """How the layout writes prompts; `templates` are what users choose by name.

    `image_line`, `text_separator` and `in_order`: see `PromptPolicy`.
    """

    template: ChatTemplate
    placeholder: str
    splice: Splice
    image_token_id: int
    templates: Mapping[str, TemplateParts]
    image_line: str = "{image}"
    text_separator: str = "\n"
    in_order: bool = False


def assemble(
    geometry: Geometry,
    names: Names,
    store: TensorStore,
    image: ImagePolicy,
    tokenizer: ConvertedTokenizer,
    prompting: Prompting,
    options: RecipeOptions,
    *,
    extra_files: tuple[Path, ...],
    unused: tuple[str, ...],
) -> ModelSpec:
    """Put parts and policies together; `extra_files` are inputs outside the checkpoint's folder.

    `unused`: see `ModelSpec`.
    """
    decoder, tower = geometry.decoder, geometry.tower
    _check_tokens(decoder, tokenizer)
    return ModelSpec(
        architecture=geometry.architecture,
        parts=(
            _vision_part(geometry, names),
            decoder_part(decoder, prefix=names.text, head=names.head),
        ),
        store=store,
        image=image,
        template=prompting.template,
        prompt=PromptPolicy(
            template_name=prompting.template.name,
            template_file="chat_template.jinja",
            stop_words=prompting.template.stop_words,
            templates=prompting.templates,
            image_placeholder=prompting.placeholder,
            splice=prompting.splice,
            image_token_id=prompting.image_token_id,
            bos_id=tokenizer.bos_id if tokenizer.add_bos else None,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            image_line=prompting.image_line,
            text_separator=prompting.text_separator,
            content_tokens=None,
            history_window=None,
            box_format=None,
            in_order=prompting.in_order,
        ),
        tokenizer_json=tokenizer.json,
        tokenizer_proof=str(tokenizer.proof),
        kv=KVLayout(decoder.layers, decoder.kv_heads, decoder.head_dim, "float32", None),
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        eos_ids=tokenizer.eos_ids,
        tokens_per_image=image.most_tokens(geometry.projector.rows(tower)),
        session_len=decoder.max_positions,
        trained_len=geometry.trained_len,
        source_files=extra_files,
        positions=Absolute(
            geometry.trained_len, decoder.attention_window, inverse_frequencies(decoder)
        ),
        unused=unused,
    )


def _check_tokens(decoder: DecoderConfig, tokenizer: ConvertedTokenizer) -> None:
    if tokenizer.vocab_size > decoder.vocab_size:
        raise CheckpointError(
            "The tokenizer has more tokens than the decoder.",
            found=f"{tokenizer.vocab_size} tokens, vocab_size {decoder.vocab_size}",
            expected="at most vocab_size tokens",
            fix="check that the tokenizer files belong to this checkpoint",
        )
    if any(token >= decoder.vocab_size for token in tokenizer.eos_ids):
        raise CheckpointError(
            "A token that should end answers is none of the decoder's.",
            found=f"eos_token_id {list(tokenizer.eos_ids)}, vocab_size {decoder.vocab_size}",
            expected="ids below vocab_size",
            fix="check generation_config.json and config.json against the published ones",
        )


def _vision_part(geometry: Geometry, names: Names) -> PartSpec:
    tower, projector = geometry.tower, geometry.projector
    width, extra_row = geometry.decoder.hidden_size, names.newline is not None
    return PartSpec(
        name="vision",
        module=partial(
            VisionEncoder,
            tower,
            projector,
            outputs=width,
            extra_row=extra_row,
        ),
        interface=VisionInterface(
            (tower.image_size,) * 2, projector.rows(tower) + extra_row, width
        ),
        weights={
            **{f"tower.{name}": weight for name, weight in names.tower.items()},
            **_projector_weights(projector, names, width),
            **({} if names.newline is None else {"extra_row": Stored(names.newline)}),
        },
    )


def _projector_weights(projector: ProjectorConfig, names: Names, width: int) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for i, theirs in enumerate(names.projector):
        bias = projector.activation is not None
        weights |= linear(f"projector.fc{i + 1}", (theirs,), (width,), bias=bias)
    for i, theirs in names.projector_norms.items():
        weights |= norm(f"projector.norm{i}", theirs)
    return weights
