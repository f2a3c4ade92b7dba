"""Configuration keys that several families share, and what a build does with each.

Sources: the configuration classes of transformers 4.31 to 5.23 (`PreTrainedConfig`,
`GenerationConfig`, `LlamaConfig`, `MistralConfig`, `CLIPVisionConfig`, `CLIPConfig`, the image
processors, `ProcessorMixin`, `PreTrainedTokenizerBase`), and the code that reads them.
"""

from __future__ import annotations

from pathlib import Path

from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.keys import (
    Key,
    KeyTable,
    check_keys,
    honoured,
    refused,
    unused,
)

# What can change the tokens of an answer that nobody asked to be sampled; `ask` is how a caller can
# have it in a call.
_LEFT_OUT = "build-engine ... --ignore-config-key {name}"


def _greedy(names: str, *admitted: object, ask: str = "") -> tuple[Key, ...]:
    instead = f"{_LEFT_OUT}, and in each call {ask}" if ask else _LEFT_OUT
    return refused("changes greedy answers", names, *admitted, instead=instead)


_ANSWER_SHAPING = (
    *_greedy("repetition_penalty", 1.0, ask="GenerationConfig(repetition_penalty=...)"),
    *_greedy("min_length", 0, ask="GenerationConfig(min_new_tokens=...)"),
    *_greedy("min_new_tokens", 0, ask="GenerationConfig(min_new_tokens=...)"),
    *_greedy("bad_words_ids", ask="GenerationConfig(bad_words=...)"),
    *_greedy("stop_strings", ask="GenerationConfig(stop_words=...)"),
    *_greedy("encoder_repetition_penalty guidance_scale", 1.0),
    *_greedy("no_repeat_ngram_size encoder_no_repeat_ngram_size penalty_alpha", 0),
    *_greedy("diversity_penalty", 0),
    *_greedy("num_beams num_beam_groups", 1),
    *_greedy("token_healing", False),
    *_greedy(
        "forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens "
        "sequence_bias exponential_decay_length_penalty constraints force_words_ids dola_layers "
        "watermarking_config forced_decoder_ids"
    ),
)
_CALLERS_CHOICE = (
    *unused("sampling and lengths are the caller's: GenerationConfig; greedy unless asked",
            "do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff "
            "max_length max_new_tokens max_time num_return_sequences renormalize_logits "
            "remove_invalid_values"),
    *unused("shapes beam search only", "early_stopping length_penalty low_memory"),
    *unused("how the original computes, or what else it returns",
            "use_cache cache_implementation cache_config return_legacy_cache output_scores "
            "output_logits output_attentions output_hidden_states return_dict "
            "return_dict_in_generate disable_compile compile_config prefill_chunk_size "
            "is_assistant num_assistant_tokens num_assistant_tokens_schedule "
            "assistant_confidence_threshold assistant_early_exit assistant_lookbehind "
            "target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size use_mtp "
            "continuous_batching_config"),
)  # fmt: skip
GENERATION_KEYS = (*_ANSWER_SHAPING, *_CALLERS_CHOICE)

_ORIGIN = unused(
    "notes of where the file came from",
    "_name_or_path name_or_path transformers_version _commit_hash _from_model_config "
    "_transformers_version",
)
_NOTES = unused(
    "notes of programs that trained or converted the model, which no model reads",
    "max_sequence_length unsloth_fixed unsloth_version",
)
_LABELS = unused(
    "of other tasks than generation",
    "id2label label2id num_labels problem_type finetuning_task task_specific_params prefix",
)
_OTHER_TOKENS = unused(
    "pads batches or starts encoders' decoders, which nothing here does",
    "pad_token_id sep_token_id decoder_start_token_id",
)
_BEGIN = unused("the tokenizer says which token begins a prompt", "bos_token_id")
_STORAGE = unused(
    "how weights are stored: the files tell; `--dtype` says how the engine stores them",
    "torch_dtype dtype use_bfloat16 torchscript tf_legacy_loss",
)
_COMPUTING = unused(
    "how the original computes, not what",
    "chunk_size_feed_forward attn_implementation _attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal _experts_implementation "
    "_flash_attn_2_enabled "
    "pretraining_tp gradient_checkpointing is_decoder tie_encoder_decoder tie_last_hidden_states",
)
_TRAINING = unused(
    "of training only",
    "attention_dropout dropout initializer_range initializer_factor",
)
QUANTIZED = refused(
    "weights that mean something else",
    "quantization_config compression_config",
    instead="build from the checkpoint that was not quantised; `--weights int8` quantises it",
)
_OTHER_SHAPES = (
    *refused("another shape of model", "is_encoder_decoder add_cross_attention", False),
    *refused("heads left out", "pruned_heads", {}),
    *refused("another shape of model", "cross_attention_hidden_size per_layer_config"),
)
CODE = unused(
    "code of its own is never run: the architecture's is known", "auto_map trust_remote_code"
)
ENDS = honoured("ids that end an answer, if generation_config.json has none", "eos_token_id")
_GENERAL: tuple[Key, ...] = (
    *(*_ORIGIN, *_NOTES, *_LABELS, *_OTHER_TOKENS, *_BEGIN, *_STORAGE, *_COMPUTING, *_TRAINING),
    *(*QUANTIZED, *_OTHER_SHAPES),
    *unused("config.json does not choose the tokenizer", "tokenizer_class"),
)
DECODER_GENERAL = (*_GENERAL, *GENERATION_KEYS)
"""Keys that every decoder's configuration may have, whatever its architecture."""
VISION_GENERAL = (
    *_GENERAL,
    *unused("a tower generates nothing", "eos_token_id tie_word_embeddings"),
    *unused("a tower generates nothing", " ".join(key.name for key in GENERATION_KEYS)),
)
"""The same of a vision tower."""

_ROPE = "rope_type type"
ROPE_KEYS = (
    *honoured("rotary base; before the plain key", "rope_theta"),
    *refused("scaled rotary positions", _ROPE, "default"),
    *refused("part of the head's width is rotated", "partial_rotary_factor", 1.0),
)
"""Keys of `rope_parameters` and `rope_scaling`."""

SCALED_ROPE_KEYS = (
    *honoured("rotary base; before the plain key", "rope_theta"),
    *honoured("plain ones, those of Llama 3.1, or dynamic ones up to the window", _ROPE),
    *honoured("of those of Llama 3.1",
              "factor low_freq_factor high_freq_factor original_max_position_embeddings"),
    *refused("part of the head's width is rotated", "partial_rotary_factor", 1.0),
)  # fmt: skip
"""The same where decoders with scaled rotary positions are published."""


def text_keys(kind: str) -> tuple[Key, ...]:
    """Keys of a decoder of Llama's form; `kind` is a key of `llama_decoder.TEXT_DEFAULTS`."""
    kinds = refused("layers of several kinds", "layer_types")
    if kind.startswith("qwen"):
        window = (
            *refused("a window in some layers' attention", "use_sliding_window", False),
            *unused("without `use_sliding_window`", "sliding_window max_window_layers"),
        )
        kinds = honoured("must be full attention in every layer", "layer_types")
        if kind.startswith("qwen2"):
            bias = unused("Qwen2Attention has its biases, whatever this says", "attention_bias")
        else:
            bias = refused("biases in projections", "attention_bias", False)
    elif kind == "mistral":
        window = honoured("window of the attention; a longer session_len is refused",
                          "sliding_window")  # fmt: skip
        bias = unused("MistralAttention has no biases, whatever this says", "attention_bias")
        bias += unused("MistralMLP has no biases, whatever this says", "mlp_bias")
    else:
        window = unused("LlamaAttention has no window, whatever this says", "sliding_window")
        bias = refused("biases in projections", "attention_bias mlp_bias", False)
    return (
        *honoured(
            "geometry",
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim rms_norm_eps",
        ),
        *honoured("activation; unknown ones are refused", "hidden_act"),
        *honoured("the window, unless `--session-len` says another", "max_position_embeddings"),
        *honoured("rotary base", "rope_theta"),
        *honoured("a section of its own", "rope_parameters rope_scaling"),
        *honoured(
            "the output matrix is the embedding, unless another is stored", "tie_word_embeddings"
        ),
        *(*window, *bias, *ENDS),
        *refused("part of the head's width is rotated", "partial_rotary_factor", 1.0),
        *kinds,
        *DECODER_GENERAL,
    )


CLIP_VISION_KEYS: tuple[Key, ...] = (
    *honoured(
        "geometry",
        "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size "
        "layer_norm_eps",
    ),
    *honoured("activation; unknown ones are refused", "hidden_act"),
    *refused("another tower", "model_type", "clip_vision_model"),
    *refused("images of other channels", "num_channels", 3),
    *unused("of the projection into CLIP's shared space, which is not used", "projection_dim"),
    *unused("of CLIP's text tower", "vocab_size"),
    *unused("`model_type` tells it", "architectures"),
    *CODE,
    *VISION_GENERAL,
)
"""Keys of a CLIP tower's section."""

_CLIP_KEYS: tuple[Key, ...] = (
    *refused("another tower", "model_type", "clip", "clip_vision_model"),
    *CLIP_VISION_KEYS,
    *honoured("a section of its own, instead of the keys at the top", "vision_config"),
    *unused(
        "of CLIP's text tower and its loss",
        "text_config text_config_dict logit_scale_init_value",
    ),
    *unused("the originals read `vision_config`", "vision_config_dict"),
)

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
_PROCESSOR_NAMES = ("LlavaProcessor", "LlavaNextProcessor", "CLIPProcessor")


def image_keys(*types: str) -> tuple[Key, ...]:
    """Keys of an image processor that may crop, of one of the `types`."""
    return (
        *refused("another image processor", "feature_extractor_type", "CLIPFeatureExtractor"),
        *honoured("which steps are taken", "do_resize do_center_crop"),
        *honoured("pixels", "crop_size"),
        *pixel_keys(*types, processors=_PROCESSOR_NAMES),
    )


def pixel_keys(*types: str, processors: tuple[str, ...]) -> tuple[Key, ...]:
    """Keys that image processors of one of the `types` share."""
    return (
        *refused("another image processor", "image_processor_type", *types),
        *refused("another processor", "processor_class", *processors),
        *honoured("which steps are taken", "do_rescale do_normalize"),
        *honoured("pixels", "size resample rescale_factor image_mean image_std"),
        *refused("images that are not RGB would reach the tower", "do_convert_rgb", True),
        *refused("a number as `size` is a square", "default_to_square use_square_size", False),
        *refused("padding to a size", "pad_size"),
        *refused("other axes", "data_format input_data_format", "channels_first"),
        *CODE,
        *unused("how the original computes, or what else it returns",
                "return_tensors device disable_grouping return_metadata model_input_names "
                "_processor_class _valid_processor_keys use_fast"),
        *unused("counts tokens for other models", "image_seq_length"),
        *_ORIGIN,
    )  # fmt: skip


VIDEO = unused(
    "videos are refused: frames are sent as images",
    "video_processor video_token video_token_id video_token_index",
)

CLIP_TYPES = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
LLAVA_TYPES = ("LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil")
NEXT_TYPES = (
    *("LlavaNextImageProcessor", "LlavaNextImageProcessorFast", "LlavaNextImageProcessorPil"),
)

TOWER = "of the vision tower"
# The originals give the tower's folder to `CLIPImageProcessor`, whatever type it names.
TOWER_TABLES = (
    KeyTable("config.json", "", _CLIP_KEYS, TOWER),
    KeyTable("config.json", "vision_config", CLIP_VISION_KEYS, TOWER),
    KeyTable(
        PREPROCESSOR,
        "",
        (*image_keys(*CLIP_TYPES), *refused("padding", "do_pad", False)),
        TOWER,
    ),
)

GENERATION = KeyTable(
    "generation_config.json",
    "",
    (
        *honoured("ids that end an answer", "eos_token_id"),
        *(*GENERATION_KEYS, *_ORIGIN, *_OTHER_TOKENS, *_BEGIN),
    ),
)

_TOKENIZER_ALWAYS = (
    *honoured("tokens with a role, and their texts",
              "bos_token eos_token unk_token pad_token sep_token cls_token mask_token "
              "additional_special_tokens added_tokens_decoder"),
    *unused("of batches and of cutting texts, which are not done here",
            "padding_side truncation_side model_max_length max_length stride truncation_strategy "
            "padding pad_to_multiple_of pad_token_type_id truncation"),
    *unused("of the library's default template, which is not used", "use_default_system_prompt"),
    *unused("names of the published files, and of the processor",
            "tokenizer_file vocab_file name_or_path special_tokens_map_file backend is_local "
            "local_files_only from_slow use_fast model_input_names "
            "model_specific_special_tokens init_kwargs"),
    *_ORIGIN,
)  # fmt: skip
_GIVEN = "a tokenizer.json says this itself"
_FROM_JSON = (
    *_TOKENIZER_ALWAYS,
    *unused(_GIVEN, "add_bos_token add_eos_token add_prefix_space legacy sp_model_kwargs "
            "spaces_between_special_tokens clean_up_tokenization_spaces do_lower_case "
            "errors tokenizer_class"),
    *honoured("must be special tokens of tokenizer.json", "image_token extra_special_tokens"),
    *refused("special tokens in prompts are text", "split_special_tokens", False),
    *CODE,
)  # fmt: skip
_FROM_MODEL = (
    *_TOKENIZER_ALWAYS,
    *honoured("tokens around and within texts", "add_bos_token add_eos_token legacy"),
    *refused("another tokenizer", "tokenizer_class", "LlamaTokenizer", "LlamaTokenizerFast"),
    *refused("another segmentation", "sp_model_kwargs", {}),
    *refused("no space before a text", "add_prefix_space", True),
    *refused("changes the text of answers",
             "clean_up_tokenization_spaces spaces_between_special_tokens", False),
    *refused("special tokens in prompts are text", "split_special_tokens do_lower_case", False),
    *honoured("must be added tokens", "image_token extra_special_tokens"),
    *CODE,
)  # fmt: skip
_JSON, _MODEL = "with a tokenizer.json", "with a tokenizer.model"
WRITTEN_TEMPLATE = unused("the original writes its own conversations", "chat_template")
OWN_TEMPLATE = honoured("the chat template", "chat_template")


def tokenizer_table(
    own: tuple[Key, ...],
    *,
    from_json: bool,
    processors: tuple[str, ...] = _PROCESSOR_NAMES,
) -> KeyTable:
    """Keys of tokenizer_config.json where a tokenizer.json is used, or a SentencePiece model.

    `own` are those of the layout, such as the template's.
    """
    keys = _FROM_JSON if from_json else _FROM_MODEL
    when = _JSON if from_json else _MODEL
    named = refused("another processor", "processor_class", *processors)
    return KeyTable("tokenizer_config.json", "", (*own, *keys, *named), when)


def check_files(
    checkpoint: Path,
    tables: tuple[KeyTable, ...],
    config: ConfigReader,
    *,
    prefer_model: bool = False,
) -> None:
    """Check the keys of config.json and of the files beside it but those of images.

    Args:
        checkpoint: Its folder.
        tables: Of its layout.
        config: Its config.json.
        prefer_model: As `convert_tokenizer` is called.

    Raises:
        CheckpointError: a file that is no JSON object, or a key that is unknown or refused.
    """
    check_keys(config, tables)
    model = (checkpoint / "tokenizer.model").is_file()
    given = (checkpoint / "tokenizer.json").is_file() and not (prefer_model and model)
    tokenizer = _JSON if given else _MODEL if model else ""
    places = {
        "generation_config.json": "",
        "chat_template.json": "",
        "tokenizer_config.json": tokenizer,
    }
    for name, when in places.items():
        if (checkpoint / name).exists():
            found = read_config(checkpoint / name, ignored=config.ignored)
            check_keys(found, tables, when)
