"""What a build does with each configuration key of the family, by architecture.

Beyond what families share: `Idefics3Config`, `SmolVLMConfig`, their vision configurations,
processors and image processors of transformers. The published text configurations carry keys of
the program that trained the models, which those classes do not read.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge_builder.checkpoint.keys import KeyTable, honoured, refused, unused
from vlmforge_recipes.config_keys import (
    CODE,
    DECODER_GENERAL,
    ENDS,
    GENERATION,
    OWN_TEMPLATE,
    PREPROCESSOR,
    PROCESSOR,
    SCALED_ROPE_KEYS,
    VIDEO,
    VISION_GENERAL,
    pixel_keys,
    text_keys,
    tokenizer_table,
)
from vlmforge_recipes.idefics3 import IDEFICS3, SMOLVLM

_PROCESSORS = ("Idefics3Processor", "SmolVLMProcessor")
_TYPES = tuple(
    f"{name}ImageProcessor{kind}"
    for name in ("Idefics3", "SmolVLM")
    for kind in ("", "Fast", "Pil")
)
_TRAINING = unused(
    "of the program that trained the models, and read by none of the classes",
    "is_llama_config neftune_noise_alpha perceiver_config pixel_shuffle_factor qk_layer_norms "
    "rope_interleaved transformers.js_config use_resampler freeze_lm_head freeze_text_layers "
    "freeze_vision_layers freeze_text_module_exceptions freeze_vision_module_exceptions "
    "num_kv_heads is_composition _pad_token_id use_base_siglip "
    "additional_vocab_size vision_config_dict",
)


def _config(model_type: str) -> tuple[KeyTable, ...]:
    top = (
        *honoured("recognises the model", "architectures"),
        *refused("another model", "model_type", model_type),
        *honoured("sections of their own", "text_config vision_config"),
        *honoured("id of the image's token, which the tokenizer must agree to", "image_token_id"),
        *honoured("how many patches along each side become one row", "scale_factor"),
        *honoured("the output matrix is the embedding, unless another is stored",
                  "tie_word_embeddings"),
        *unused("`text_config` says it", "vocab_size hidden_size"),
        *unused("the tower's geometry says it", "image_seq_len"),
        *(*VIDEO, *_TRAINING, *ENDS, *CODE, *DECODER_GENERAL),
    )  # fmt: skip
    vision = (
        *honoured("geometry",
                  "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size "
                  "patch_size layer_norm_eps"),
        *honoured("activation; unknown ones are refused", "hidden_act"),
        *refused("another tower", "model_type", f"{model_type}_vision", model_type),
        *refused("images of other channels", "num_channels", 3),
        *unused("the image processor says it", "max_image_size size"),
        *unused("`model_type` tells it", "architectures"),
        *(*_TRAINING, *CODE, *VISION_GENERAL),
    )  # fmt: skip
    text = (
        *refused("another decoder", "model_type", "llama"),
        *unused("`model_type` tells it", "architectures"),
        *(*_TRAINING, *CODE, *text_keys("llama")),
    )
    rope = ("text_config.rope_parameters", "text_config.rope_scaling")
    return (
        KeyTable("config.json", "", top),
        KeyTable("config.json", "text_config", text),
        *(KeyTable("config.json", place, SCALED_ROPE_KEYS) for place in rope),
        KeyTable("config.json", "vision_config", vision),
    )


_IMAGE = (
    *honoured("whether images are cut into tiles", "do_image_splitting"),
    *honoured("the tiles' size, which must be the tower's", "max_image_size"),
    *refused("images that are not resized first", "do_resize", True),
    *unused("views have one size, so nothing is padded", "do_pad"),
    *unused("tells of the tiles, which are known here", "return_row_col_info"),
    *refused("views that are cut", "do_center_crop", False),
    *refused("views that are cut", "crop_size"),
    *unused("of videos, which are refused", "video_sampling"),
    *unused("`size` is of its own form", "default_to_square"),
    *pixel_keys(*_TYPES, processors=_PROCESSORS),
)

_PROCESSOR_KEYS = (
    *honoured("before preprocessor_config.json", "image_processor"),
    *honoured("before the other places of a chat template", "chat_template"),
    *honoured("must agree with the tower", "image_seq_len"),
    *refused("another processor", "processor_class", *_PROCESSORS),
    *unused("notes of where the file came from", "transformers_version _commit_hash"),
    *(*VIDEO, *CODE),
)

_TOKENIZER = (
    *OWN_TEMPLATE,
    *honoured("texts around the tokens of an image", "fake_image_token global_image_token"),
    *unused("the chat template writes it", "end_of_utterance_token"),
    *unused("of truncation", "add_prefix_space trim_offsets vocab_size"),
    *VIDEO,
)


def _tables(model_type: str) -> tuple[KeyTable, ...]:
    return (
        *_config(model_type),
        KeyTable(PREPROCESSOR, "", _IMAGE),
        KeyTable(PROCESSOR, "", _PROCESSOR_KEYS),
        KeyTable(PROCESSOR, "image_processor", _IMAGE),
        GENERATION,
        tokenizer_table(_TOKENIZER, from_json=True, processors=_PROCESSORS),
        KeyTable("chat_template.json", "", OWN_TEMPLATE),
    )


TABLES: Mapping[str, tuple[KeyTable, ...]] = {
    IDEFICS3: _tables("idefics3"),
    SMOLVLM: _tables("smolvlm"),
}
"""By architecture."""

DOCUMENTED = {
    "Idefics3 and SmolVLM of transformers": TABLES[IDEFICS3],
    "SmolVLM2 of transformers": TABLES[SMOLVLM],
}
