"""The JSON files of a synthetic checkpoint, with the fields of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

from vlmforge_recipes.llava.synthetic.spec import (
    IMAGE_ID,
    PAD_ID,
    SyntheticSpec,
    TextSpec,
    VisionSpec,
)
from vlmforge_recipes.llava.synthetic.tensors import IGNORED

Json = dict[str, object]

TOWER_NAME = "openai/clip-vit-large-patch14-336"
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
# The published text, character for character.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# What the published text_config leaves to the defaults of its class.
TEXT_DEFAULTS: Json = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def write_json(path: Path, value: Json) -> None:
    """Indented and UTF-8, as the published files are."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_hf_configs(folder: Path, spec: SyntheticSpec) -> None:
    """config, generation_config, preprocessor_config, processor_config and chat_template."""
    write_json(folder / "config.json", _hf_config(spec))
    ids: Json = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD_ID}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_json(folder / "preprocessor_config.json", _hf_preprocessor(spec.vision.image_size))
    write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": spec.vision.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def write_original_configs(folder: Path, spec: SyntheticSpec, *, tower: str = TOWER_NAME) -> None:
    """config and generation_config; `tower` is where the vision tower is found."""
    write_json(folder / "config.json", {**_original_config(spec), "mm_vision_tower": tower})
    ids: Json = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    limit = spec.text.max_positions
    write_json(folder / "generation_config.json", {"max_length": limit, **ids})


def write_tower_configs(folder: Path, spec: SyntheticSpec) -> None:
    """config (vision numbers nested) and preprocessor_config (sizes as plain numbers)."""
    write_json(folder / "config.json", _tower_config(spec.vision))
    size = spec.vision.image_size
    write_json(folder / "preprocessor_config.json", clip_preprocessor(size))


def clip_preprocessor(size: int) -> Json:
    """The image processor of a stock tower, with sizes as plain numbers."""
    return {
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "size": size,
    }


def clip_tower_config(vision: VisionSpec) -> Json:
    """A stock tower alone, without the text model that is published beside it."""
    return {
        **_vision_config(vision),
        "architectures": ["CLIPVisionModel"],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "num_channels": 3,
    }


def _hf_config(spec: SyntheticSpec) -> Json:
    dtype_key = "torch_dtype" if spec.keys == "old" else "dtype"
    text = _text_config(spec.text)
    if spec.keys == "new":
        theta = text.pop("rope_theta")
        text["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
        text["head_dim"] = spec.text.hidden // spec.text.heads
    else:
        text = {key: text[key] for key in text if text[key] != TEXT_DEFAULTS.get(key)}
        if spec.text.kv_heads == spec.text.heads == TEXT_DEFAULTS["num_attention_heads"]:
            del text["num_key_value_heads"]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": IMAGE_ID,
        "model_type": "llava",
        "pad_token_id": PAD_ID,
        "projector_hidden_act": "gelu",
        "text_config": {**text, dtype_key: spec.dtype},
        "tie_word_embeddings": spec.text.tied,
        dtype_key: spec.dtype,
        "vision_config": _vision_config(spec.vision),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": spec.text.vocab,
    }


def _text_config(text: TextSpec) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": text.hidden,
        "intermediate_size": text.intermediate,
        "max_position_embeddings": text.max_positions,
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "num_key_value_heads": text.kv_heads,
        "rms_norm_eps": text.rms_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tied,
        "vocab_size": text.vocab,
    }


def _vision_config(vision: VisionSpec) -> Json:
    return {
        "hidden_size": vision.hidden,
        "image_size": vision.image_size,
        "intermediate_size": vision.intermediate,
        "model_type": "clip_vision_model",
        "num_attention_heads": vision.heads,
        "num_hidden_layers": vision.layers,
        "patch_size": vision.patch_size,
        "projection_dim": 768,
        "vocab_size": 32000,
    }


def _hf_preprocessor(size: int) -> Json:
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": STD,
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def _original_config(spec: SyntheticSpec) -> Json:
    text = _text_config(spec.text)
    # Other values of theta were never published in this layout; the class reads them the same way.
    if text["rope_theta"] == TEXT_DEFAULTS["rope_theta"]:
        del text["rope_theta"]
    return {
        **text,
        "_name_or_path": "llava-v1.5",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "max_length": spec.text.max_positions,
        "mm_hidden_size": spec.vision.hidden,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "model_type": "llava",
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": spec.dtype,
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
    }


def _tower_config(vision: VisionSpec) -> Json:
    shared: Json = {
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "projection_dim": IGNORED.projection,
    }
    return {
        "architectures": ["CLIPModel"],
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": IGNORED.projection,
        "text_config": {
            **shared,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "hidden_size": IGNORED.hidden,
            "intermediate_size": IGNORED.intermediate,
            "max_position_embeddings": IGNORED.positions,
            "model_type": "clip_text_model",
            "num_attention_heads": IGNORED.heads,
            "num_hidden_layers": IGNORED.layers,
            "vocab_size": IGNORED.vocab,
        },
        "torch_dtype": "float32",
        "vision_config": {**_vision_config(vision), **shared, "num_channels": 3},
    }
