"""What a build does with each configuration key of the family.

Sources: `configuration_qwen.py`, `modeling_qwen.py`, `visual.py`, `tokenization_qwen.py` and
`qwen_generation_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge_builder.checkpoint.keys import KeyTable, honoured, refused, unused
from vlmforge_recipes.config_keys import DECODER_GENERAL, GENERATION, tokenizer_table

_THIS_CODE = unused("this recipe stands for that code", "auto_map")

_TOP = (
    *honoured("recognises the model", "architectures"),
    *unused("`architectures` tells it", "model_type tokenizer_type"),
    *honoured("a section of its own", "visual"),
    *honoured("geometry",
              "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
              "kv_channels layer_norm_epsilon"),
    *honoured("rotary base", "rotary_emb_base"),
    *honoured("positions beyond the length of training",
              "seq_length use_dynamic_ntk use_logn_attn"),
    *honoured("the window, unless `--session-len` says another", "max_position_embeddings"),
    *honoured("the output matrix is the embedding, unless another is stored",
              "tie_word_embeddings"),
    *refused("biases in projections", "no_bias", True),
    *refused("attention without its scale", "scale_attn_weights", True),
    *refused("part of the head's width is rotated", "rotary_pct", 1.0),
    *refused("a cache of fewer bits", "use_cache_quantization", False),
    *unused("of training only", "attn_dropout_prob emb_dropout_prob resid_dropout_prob"),
    *unused("how the original computes: `--dtype` says how weights are stored",
            "bf16 fp16 fp32 use_flash_attn use_cache_kernel softmax_in_fp32 onnx_safe"),
    *unused("generation_config.json and the tokenizer say it", "eos_token_id"),
    *(*_THIS_CODE, *DECODER_GENERAL),
)  # fmt: skip
_VISUAL = honoured(
    "geometry, and the id of the image's first token",
    "image_size patch_size width layers heads mlp_ratio output_dim n_queries image_start_id",
)
_CHAT = (
    *honoured("tokens of earlier turns that are sent", "max_window_size"),
    *refused("prompts that are not the chat's", "chat_format", "chatml"),
)
_TOKENIZER = (
    *refused("another tokenizer", "tokenizer_class", "QWenTokenizer", "PreTrainedTokenizerFast",
             "TokenizersBackend"),
    *unused("of the original's drawing and decoding of bytes", "errors image_start_tag "
            "image_end_tag image_pad_tag ref_start_tag ref_end_tag box_start_tag box_end_tag "
            "quad_start_tag quad_end_tag"),
    *unused("the original writes its own conversations", "chat_template"),
    *_THIS_CODE,
)  # fmt: skip
# The original's tokenizer has its special tokens in its code.
_RANKS = (
    *unused("the original's code says it",
            "bos_token eos_token unk_token pad_token sep_token cls_token mask_token"),
    *refused("more special tokens",
             "additional_special_tokens added_tokens_decoder extra_special_tokens", [], {}),
    *unused("of batches and of cutting texts, which are not done here",
            "padding_side truncation_side model_max_length"),
    *unused("of other tokenizers", "add_bos_token add_eos_token add_prefix_space legacy "
            "clean_up_tokenization_spaces spaces_between_special_tokens split_special_tokens"),
    *unused("notes of where the file came from", "name_or_path _commit_hash backend is_local"),
)  # fmt: skip

TABLES: tuple[KeyTable, ...] = (
    KeyTable("config.json", "", _TOP),
    KeyTable("config.json", "visual", _VISUAL),
    KeyTable("generation_config.json", "", (*_CHAT, *GENERATION.keys)),
    KeyTable("tokenizer_config.json", "", (*_TOKENIZER, *_RANKS)),
    tokenizer_table(_TOKENIZER, from_json=True),
)
"""Of its one layout."""

DOCUMENTED: Mapping[str, tuple[KeyTable, ...]] = {"Qwen-VL-Chat": TABLES}
"""By the layout's name in docs/checkpoints.md."""
