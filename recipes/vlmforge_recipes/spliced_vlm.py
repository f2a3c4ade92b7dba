"""What families share whose image features take the place of token embeddings: the assembly.

A vision tower, a projector and a decoder become parts and policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.interface import VisionInterface
from vlmforge.engine.manifest import KVLayout
from vlmforge.engine.positions import Absolute
from vlmforge.engine.prompts import PromptPolicy, Splice, TemplateParts
from vlmforge.errors import CheckpointError
from vlmforge_builder.blocks.decoder import DecoderConfig, inverse_frequencies
from vlmforge_builder.blocks.vision import VisionConfig, VisionEncoder
from vlmforge_builder.checkpoint.store import TensorStore
from vlmforge_builder.recipe import ChatTemplate, ModelSpec, PartSpec, RecipeOptions
from vlmforge_builder.tokenizer.convert import ConvertedTokenizer
from vlmforge_builder.weights import Stored, Weight
from vlmforge_recipes.clip_tower import linear, norm, tower_weights
from vlmforge_recipes.llama_decoder import decoder_part


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the model. `projector_norm_eps` is None where the projector has no norms."""

    decoder: DecoderConfig
    tower: VisionConfig
    trained_len: int
    projector_act: str
    architecture: str
    projector_norm_eps: float | None = None


@dataclass(frozen=True, slots=True)
class Names:
    """What the checkpoint's tensors are called: prefixes, and the whole names of the head.

    `projector` are its linear layers, `projector_norms` its layer normalisations, if it has any.
    `newline` is the whole name of the row that ends each line of an image, where one is used.
    """

    text: str
    head: str
    vision: str
    projector: tuple[str, str]
    projector_norms: tuple[str, ...] = ()
    newline: str | None = None


@dataclass(frozen=True, slots=True)
class Prompting:
    """How the layout writes prompts; `templates` are what users choose by name."""

    template: ChatTemplate
    placeholder: str
    splice: Splice
    image_token_id: int
    templates: Mapping[str, TemplateParts]


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
            image_line="{image}",
            text_separator="\n",
            content_tokens=None,
            history_window=None,
            box_format=None,
        ),
        tokenizer_json=tokenizer.json,
        tokenizer_proof=str(tokenizer.proof),
        kv=KVLayout(decoder.layers, decoder.kv_heads, decoder.head_dim, "float32", None),
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        eos_ids=tokenizer.eos_ids,
        tokens_per_image=image.most_tokens(tower.tokens),
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
    tower, width = geometry.tower, geometry.decoder.hidden_size
    extra_row = names.newline is not None
    return PartSpec(
        name="vision",
        module=partial(
            VisionEncoder,
            tower,
            outputs=width,
            projector_act=geometry.projector_act,
            projector_norm_eps=geometry.projector_norm_eps,
            extra_row=extra_row,
        ),
        interface=VisionInterface((tower.image_size,) * 2, tower.tokens + extra_row, width),
        weights={
            **tower_weights(tower, ours="tower.", prefix=names.vision),
            **linear("projector.fc1", (names.projector[0],), (width,)),
            **linear("projector.fc2", (names.projector[1],), (width,)),
            **_projector_norms(names),
            **({} if names.newline is None else {"extra_row": Stored(names.newline)}),
        },
    )


def _projector_norms(names: Names) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for i, theirs in enumerate(names.projector_norms):
        weights |= norm(f"projector.norm{i + 1}", theirs)
    return weights
