"""Configuration keys of Qwen's vision-language models, and what a build does with each.

Sources: `Qwen2VLConfig`, `Qwen2_5_VLConfig`, `Qwen3VLConfig` and `Qwen2VLImageProcessorPil` of
transformers, and the files of the published checkpoints.
"""

from __future__ import annotations

from vlmforge_builder.checkpoint.keys import Key, KeyTable, honoured, refused, unused
from vlmforge_recipes.config_keys import (
    CODE,
    DECODER_GENERAL,
    ENDS,
    GENERATION,
    OWN_TEMPLATE,
    PREPROCESSOR,
    PROCESSOR,
    VIDEO,
    VISION_GENERAL,
    pixel_keys,
    tokenizer_table,
)

TYPES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")

PROCESSORS = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")

TOP: tuple[Key, ...] = (
    *honoured("recognises the model", "architectures"),
    *honoured("sections of their own", "text_config vision_config"),
    *honoured("ids around and of images, which the tokenizer must agree to",
              "image_token_id vision_start_token_id vision_end_token_id"),
    *honoured("the output matrix is the embedding, unless another is stored",
              "tie_word_embeddings"),
    *VIDEO,
    *unused("of no image: the placeholder of training data", "vision_token_id"),
    *unused("`architectures` tells it", "model_type"),
    *(*ENDS, *CODE, *DECODER_GENERAL),
)  # fmt: skip

_TOWER: tuple[Key, ...] = (
    *honoured("geometry", "depth num_heads patch_size spatial_merge_size temporal_patch_size"),
    *honoured("activation; unknown ones are refused", "hidden_act"),
    *honoured("a section of its own", "rope_parameters"),
    *refused("images of other channels", "in_channels in_chans", 3),
    *unused("`patch_size` tells it", "spatial_patch_size"),
    *unused("of videos", "tokens_per_second"),
    *unused("`architectures` of the file tells it", "model_type architectures"),
)
_VISION_THETA = (
    *honoured("base of the angles of patches", "rope_theta"),
    *refused("other angles of patches", "rope_type type", "axial"),
)


def patch_tables(
    *, text: KeyTable, old: bool, rope: tuple[Key, ...], vision: tuple[Key, ...]
) -> tuple[KeyTable, ...]:
    """The tables of a layout.

    Args:
        text: Of the decoder, wherever it stands.
        old: How its tokens are turned is said in `rope_scaling`, as before transformers 5.
        rope: Of that section.
        vision: Of the tower, beside what all towers have.
    """
    name, other = ("rope_scaling", "rope_parameters")[:: 1 if old else -1]
    keys = (*refused(f"`{name}` says it", other), *text.keys)
    decoder: tuple[KeyTable, ...] = (KeyTable("config.json", "", (*keys, *TOP)),)
    if text.place:
        own = KeyTable("config.json", text.place, keys)
        decoder = (KeyTable("config.json", "", TOP), own)
    place = f"{text.place}.{name}" if text.place else name
    return (
        *decoder,
        KeyTable("config.json", place, rope),
        KeyTable("config.json", "vision_config", (*vision, *_TOWER, *CODE, *VISION_GENERAL)),
        KeyTable("config.json", "vision_config.rope_parameters", _VISION_THETA),
        KeyTable(PREPROCESSOR, "", _IMAGES),
        KeyTable(PROCESSOR, "", _PROCESSOR),
        KeyTable(PROCESSOR, "image_processor", _IMAGES),
        GENERATION,
        KeyTable("chat_template.json", "", OWN_TEMPLATE),
        tokenizer_table(_TOKENIZER, from_json=True, processors=PROCESSORS),
    )


_IMAGES: tuple[Key, ...] = (
    *refused("images that are not resized to whole patches", "do_resize", True),
    *honoured("limits of an image's pixels; the first two win", "min_pixels max_pixels size"),
    *honoured("must be the tower's", "patch_size temporal_patch_size merge_size"),
    *refused("a crop, or padding", "do_center_crop do_pad", False),
    *unused("of images that are cropped", "crop_size default_to_square"),
    *pixel_keys(*TYPES, processors=PROCESSORS),
)
_PROCESSOR: tuple[Key, ...] = (
    *honoured("a section of its own, which wins over preprocessor_config.json", "image_processor"),
    *honoured("before the other places of a chat template", "chat_template"),
    *refused("another processor", "processor_class", *PROCESSORS),
    *unused("notes of where the file came from", "transformers_version _commit_hash"),
    *(*VIDEO, *CODE),
)
_TOKENIZER: tuple[Key, ...] = (
    *OWN_TEMPLATE,
    *unused("of batches", "return_token_type_ids"),
    *VIDEO,
)
