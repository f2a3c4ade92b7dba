"""Checkpoints of LLaVA v1.6 in the original layout, drawn at random."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from original_models import TOWER_INSIDE
from sentencepiece_models import edited, trained

SIDE = 56
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
TOWER = "openai/clip-vit-large-patch14-336"
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}


@dataclass(frozen=True)
class Variant:
    """What differs between the published sizes."""

    seed: int
    kv_heads: int
    rope_theta: float
    chatml: bool


VICUNA = Variant(seed=61, kv_heads=4, rope_theta=10000.0, chatml=False)
CHATML = Variant(seed=62, kv_heads=1, rope_theta=5000000.0, chatml=True)
"""As v1.6 34B: grouped heads, no BOS, ends with <|im_end|>."""


def write(folder: Path, variant: Variant) -> Path:
    """The checkpoint's folder; its stock tower, with other weights, lies beside it."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    vocab, eos = _write_tokenizer(checkpoint, variant)
    text = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=variant.kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    _write_weights(checkpoint, text, variant.seed)
    _write_tower(folder / TOWER, variant.seed + 1000)
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **{key: getattr(text, key) for key in _KEPT},
        "rope_theta": variant.rope_theta,
        "eos_token_id": eos,
        "image_aspect_ratio": "anyres",
        # The published files have either form.
        "image_grid_pinpoints": str(PINPOINTS) if variant.chatml else PINPOINTS,
        "mm_hidden_size": 32,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": TOWER,
        "tokenizer_model_max_length": 4096,
        "torch_dtype": "bfloat16",
        "unfreeze_mm_vision_tower": True,
    }
    _write_json(checkpoint / "config.json", config)
    return checkpoint


_KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "hidden_act"),
)


def _write_tokenizer(folder: Path, variant: Variant) -> tuple[int, int]:
    """Vocabulary size and end id. The ChatML tokens are pieces of the model, as in Yi's."""
    if not variant.chatml:
        (folder / "tokenizer.model").write_bytes(trained())
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config = {"add_bos_token": True, "legacy": False, **names}
        _write_json(folder / "tokenizer_config.json", config)
        return 448, 2
    tags = ("<|im_start|>", "<|im_end|>")
    model = trained(user_defined=tags, add_dummy_prefix=False)
    model = edited(model, piece=(1, "<|startoftext|>"))
    model = edited(model, piece=(2, "<|endoftext|>"))
    (folder / "tokenizer.model").write_bytes(model)
    special = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        str(index): {"content": content, "special": True, **special}
        for index, content in enumerate(("<unk>", "<|startoftext|>", "<|endoftext|>", *tags))
    }
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    config = {"add_bos_token": False, "legacy": True, "added_tokens_decoder": added, **names}
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": 4, "pad_token_id": 0})
    return 448, 4


def _write_weights(folder: Path, text: LlamaConfig, seed: int) -> None:
    hidden = text.hidden_size
    shapes = {name: t.shape for name, t in LlamaForCausalLM(text).state_dict().items()}
    shapes |= {"model.image_newline": torch.Size((hidden,))}
    for layer, width in ((0, 32), (2, hidden)):
        shapes[f"model.mm_projector.{layer}.weight"] = torch.Size((hidden, width))
        shapes[f"model.mm_projector.{layer}.bias"] = torch.Size((hidden,))
    state = _drawn(shapes, seed) | {
        TOWER_INSIDE + name: tensor for name, tensor in _tower_state(seed + 1).items()
    }
    names = sorted(state)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({name: state[name].contiguous() for name in held}, folder / file)
    index = {name: file for file, held in shards.items() for name in held}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def _write_tower(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    state = {f"vision_model.{name}": tensor for name, tensor in _tower_state(seed).items()}
    save_file(state, folder / "model.safetensors")
    _write_json(folder / "config.json", {"model_type": "clip", "vision_config": _VISION})
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": SIDE,
        "crop_size": SIDE,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    _write_json(folder / "preprocessor_config.json", processor)


def _tower_state(seed: int) -> dict[str, torch.Tensor]:
    module = CLIPVisionModel(CLIPVisionConfig(**_VISION))
    shapes = {name: t.shape for name, t in module.state_dict().items()}
    return _drawn({n: s for n, s in shapes.items() if "position_ids" not in n}, seed)


def _drawn(shapes: Mapping[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations of order one, all exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bias") or len(shape) == 1:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            return centre + 0.3 * noise
        scale = 1.0 if "embed" in name else 3.0 if "lm_head" in name else 1.2
        fan_in = 1 if "embed" in name else shape[1:].numel()
        return scale * noise / fan_in**0.5

    return {name: draw(name, shape).bfloat16() for name, shape in shapes.items()}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1), "utf-8")
