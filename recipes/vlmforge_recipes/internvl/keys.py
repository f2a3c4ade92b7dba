"""What a build does with each configuration key of the family, by decoder.

Beyond what families share: `InternVLConfig`, `InternVLVisionConfig`, `InternVLProcessor` and
`GotOcr2ImageProcessor` of transformers.
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

_TYPES = ("GotOcr2ImageProcessor", "GotOcr2ImageProcessorFast", "GotOcr2ImageProcessorPil")
_PROCESSORS = ("InternVLProcessor",)

_TOP = (
    *honoured("recognises the model", "architectures"),
    *refused("another model", "model_type", "internvl"),
    *honoured("sections of their own", "text_config vision_config"),
    *honoured("id of the image's token, which the tokenizer must agree to", "image_token_id"),
    *honoured("how many patches become one row", "downsample_ratio"),
    *honoured("activation; unknown ones are refused", "projector_hidden_act"),
    *honoured("the output matrix is the embedding, unless another is stored",
              "tie_word_embeddings"),
    *refused("features of another layer", "vision_feature_layer", -1),
    *refused("the class token among the patches", "vision_feature_select_strategy", "default"),
    *unused("the tower's geometry says it", "image_seq_length"),
    *VIDEO,
    *(*ENDS, *CODE, *DECODER_GENERAL),
)  # fmt: skip

_VISION = (
    *honoured("geometry",
              "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size "
              "patch_size layer_norm_eps"),
    *honoured("activation; unknown ones are refused", "hidden_act"),
    *honoured("biases of query, key and value", "attention_bias"),
    *honoured("without it a norm is behind the layers", "use_mean_pooling"),
    *honoured("kind of the norms; others than InternViT-300M's are refused", "norm_type"),
    *refused("norms of query and key", "use_qk_norm", False),
    *refused("another tower", "model_type", "internvl_vision"),
    *refused("images of other channels", "num_channels", 3),
    *refused("a tower without positions", "use_absolute_position_embeddings", True),
    *unused("of training only",
            "hidden_dropout_prob projection_dropout layer_scale_init_value use_mask_token "
            "drop_path_rate"),
    *unused("`model_type` tells it", "architectures"),
    *(*CODE, *VISION_GENERAL),
)  # fmt: skip

_IMAGE = (
    *unused("the processor always asks for tiles", "crop_to_patches"),
    *honoured("how many tiles", "min_patches max_patches"),
    *refused("images of another size than the tower's", "do_resize", True),
    *refused("views that are cut", "do_center_crop do_pad", False),
    *refused("views that are cut", "crop_size"),
    *unused("`size` has both sides", "default_to_square"),
    *pixel_keys(*_TYPES, processors=_PROCESSORS),
)

_PROCESSOR_KEYS = (
    *honoured("before preprocessor_config.json", "image_processor"),
    *honoured("before the other places of a chat template", "chat_template"),
    *honoured("must agree with the tower", "image_seq_length"),
    *refused("another processor", "processor_class", *_PROCESSORS),
    *unused("notes of where the file came from", "transformers_version _commit_hash"),
    *(*VIDEO, *CODE),
)

_TOKENIZER = (
    *OWN_TEMPLATE,
    *honoured("texts around an image", "start_image_token end_image_token"),
    *refused("another text where an image goes", "context_image_token", "<IMG_CONTEXT>"),
    *unused("of batches", "return_token_type_ids"),
    *VIDEO,
)


def _tables(kind: str) -> tuple[KeyTable, ...]:
    rope = ("text_config.rope_parameters", "text_config.rope_scaling")
    return (
        KeyTable("config.json", "", _TOP),
        KeyTable(
            "config.json",
            "text_config",
            (
                *honoured("which decoder; others are refused", "model_type"),
                *unused("`model_type` tells it", "architectures"),
                *(*CODE, *text_keys(kind)),
            ),
        ),
        *(KeyTable("config.json", place, SCALED_ROPE_KEYS) for place in rope),
        KeyTable("config.json", "vision_config", _VISION),
        KeyTable(PREPROCESSOR, "", _IMAGE),
        KeyTable(PROCESSOR, "", _PROCESSOR_KEYS),
        KeyTable(PROCESSOR, "image_processor", _IMAGE),
        GENERATION,
        tokenizer_table(_TOKENIZER, from_json=True, processors=_PROCESSORS),
        KeyTable("chat_template.json", "", OWN_TEMPLATE),
    )


TABLES: Mapping[str, tuple[KeyTable, ...]] = {
    kind: _tables(kind) for kind in ("qwen2", "qwen3", "llama")
}
"""By the decoder's `model_type`."""

DOCUMENTED = {
    "InternVL of transformers, Qwen2": TABLES["qwen2"],
    "InternVL of transformers, Qwen3": TABLES["qwen3"],
    "InternVL of transformers, Llama": TABLES["llama"],
}
