"""What a build does with each configuration key of the family, by layout.

Beyond what families share: `LlavaConfig` and `LlavaNextConfig` of transformers, and
`llava/model/llava_arch.py`, `llava/train/train.py` and `llava/model/builder.py` of the original
and of LLaVA-NeXT, whose training script writes the keys of videos whatever it trains on.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge_builder.checkpoint.keys import KeyTable, honoured, refused, unused
from vlmforge_recipes.config_keys import (
    CLIP_TYPES,
    CLIP_VISION_KEYS,
    CODE,
    DECODER_GENERAL,
    ENDS,
    GENERATION,
    LLAVA_TYPES,
    NEXT_TYPES,
    OWN_TEMPLATE,
    PREPROCESSOR,
    PROCESSOR,
    ROPE_KEYS,
    TOWER_TABLES,
    WRITTEN_TEMPLATE,
    image_keys,
    text_keys,
    tokenizer_table,
)
from vlmforge_recipes.llava.layout import HF, HF_ANYRES, ORIGINAL, ORIGINAL_MISTRAL

_HF_TOP = (
    *honoured("recognises the model", "architectures"),
    *honoured("sections of their own", "text_config vision_config"),
    *honoured("id of the image's token, which the tokenizer must agree to",
              "image_token_index image_token_id"),
    *honoured("features of the tower", "vision_feature_layer vision_feature_select_strategy"),
    *honoured("activation; unknown ones are refused", "projector_hidden_act"),
    *honoured("the output matrix is the embedding, unless another is stored",
              "tie_word_embeddings"),
    *refused("a projector without biases", "multimodal_projector_bias", True),
    *unused("of training", "ignore_index"),
    *unused("`text_config` says it", "vocab_size"),
    *unused("the tower's geometry says it", "image_seq_length"),
    *unused("the row is there in any case", "use_image_newline_parameter"),
    *(*ENDS, *CODE, *DECODER_GENERAL),
)  # fmt: skip
_PINPOINTS = honoured("canvases; both files must say the same", "image_grid_pinpoints")


def _hf(kind: str, model_type: str, *, anyres: bool) -> tuple[KeyTable, ...]:
    more = _PINPOINTS if anyres else ()
    image = (
        *(*more, *image_keys(*(NEXT_TYPES if anyres else (*CLIP_TYPES, *LLAVA_TYPES)))),
        *(
            unused("pads batches with views that are not used", "do_pad")
            if anyres
            else honoured("a square first, with LlavaImageProcessor", "do_pad")
        ),
        *unused("what LlavaNextImageProcessor always does", "aspect_ratio_setting"),
    )
    return (
        KeyTable(
            "config.json",
            "",
            (*more, *refused("another model", "model_type", model_type), *_HF_TOP),
        ),
        KeyTable(
            "config.json",
            "text_config",
            (
                *honoured("which decoder; others are refused", "model_type"),
                *unused("`model_type` tells it", "architectures"),
                *(*CODE, *text_keys(kind)),
            ),
        ),
        *(KeyTable("config.json", f"text_config.{place}", ROPE_KEYS) for place in _ROPE_PLACES),
        KeyTable("config.json", "vision_config", CLIP_VISION_KEYS),
        KeyTable(PREPROCESSOR, "", image),
        KeyTable(PROCESSOR, "", _PROCESSOR_KEYS),
        KeyTable(PROCESSOR, "image_processor", image),
        GENERATION,
        tokenizer_table(OWN_TEMPLATE, from_json=True),
        tokenizer_table(OWN_TEMPLATE, from_json=False),
        KeyTable("chat_template.json", "", OWN_TEMPLATE),
    )


_ROPE_PLACES = ("rope_parameters", "rope_scaling")
_PROCESSOR_KEYS = (
    *honoured("before preprocessor_config.json", "image_processor"),
    *honoured("before the other places of a chat template", "chat_template"),
    *honoured("must agree with the tower",
              "patch_size num_additional_image_tokens vision_feature_select_strategy"),
    *refused("another text where an image goes", "image_token", "<image>"),
    *refused("another processor", "processor_class", "LlavaProcessor", "LlavaNextProcessor"),
    *unused("notes of where the file came from", "transformers_version _commit_hash"),
    *CODE,
)  # fmt: skip

_ORIGINAL_TOP = (
    *honoured("recognises the model", "architectures"),
    *unused("`architectures` tells it", "model_type"),
    *honoured("where the vision tower is", "mm_vision_tower"),
    *honoured("features of the tower", "mm_vision_select_layer mm_vision_select_feature"),
    *honoured("must be the tower's", "mm_hidden_size"),
    *honoured("kind; unknown ones are refused", "mm_projector_type"),
    *honoured("how images become views and rows; unknown ones are refused",
              "image_aspect_ratio mm_patch_merge_type image_grid_pinpoints"),
    *honoured("whether the tower inside the checkpoint is used",
              "unfreeze_mm_vision_tower mm_tunable_parts"),
    *honoured("the window, unless `--session-len` says another", "tokenizer_model_max_length"),
    *refused("tokens around images", "mm_use_im_start_end mm_use_im_patch_token", False),
    *refused("another way from features to rows",
             "mm_resampler_type s2 s2_scales", False),
    *unused("of videos, and of the resampler that is refused",
            "mm_spatial_pool_mode mm_spatial_pool_stride mm_spatial_pool_out_channels "
            "mm_newline_position add_faster_video faster_token_stride add_time_instruction "
            "force_sample"),
    *unused("of batches", "tokenizer_padding_side"),
    *unused("the weights tell it", "use_mm_proj has_init_vision has_init_gate"),
    *unused("written by the training script and read by nothing",
            "image_crop_resolution image_split_resolution"),
    *unused("of training only",
            "freeze_* tune_* unfreeze_mm_vision_resampler unfreeze_language_model *_lr "
            "pretrain_mm_mlp_adapter vision_tower_pretrained use_pos_skipping pos_skipping_range "
            "group_by_modality_length lora_* bits"),
    *CODE,
)  # fmt: skip


def _original(kind: str) -> tuple[KeyTable, ...]:
    return (
        KeyTable("config.json", "", (*_ORIGINAL_TOP, *text_keys(kind))),
        *(KeyTable("config.json", place, ROPE_KEYS) for place in _ROPE_PLACES),
        *TOWER_TABLES,
        GENERATION,
        tokenizer_table(WRITTEN_TEMPLATE, from_json=True),
        tokenizer_table(WRITTEN_TEMPLATE, from_json=False),
    )


LAYOUTS: Mapping[tuple[str, str], tuple[KeyTable, ...]] = {
    (HF, "llama"): _hf("llama", "llava", anyres=False),
    (HF, "mistral"): _hf("mistral", "llava", anyres=False),
    (HF_ANYRES, "llama"): _hf("llama", "llava_next", anyres=True),
    (HF_ANYRES, "mistral"): _hf("mistral", "llava_next", anyres=True),
    (ORIGINAL, "llama"): _original("llama"),
    (ORIGINAL_MISTRAL, "mistral"): _original("mistral"),
}
"""By architecture and kind of decoder."""

DOCUMENTED: Mapping[str, tuple[KeyTable, ...]] = {
    "LLaVA v1.5 of transformers, Llama": LAYOUTS[HF, "llama"],
    "LLaVA v1.5 of transformers, Mistral": LAYOUTS[HF, "mistral"],
    "LLaVA v1.6 of transformers, Llama": LAYOUTS[HF_ANYRES, "llama"],
    "LLaVA v1.6 of transformers, Mistral": LAYOUTS[HF_ANYRES, "mistral"],
    "original LLaVA, Llama": LAYOUTS[ORIGINAL, "llama"],
    "original LLaVA, Mistral": LAYOUTS[ORIGINAL_MISTRAL, "mistral"],
}
"""By the layout's name in docs/checkpoints.md."""
