"""Checkpoints of published shapes with random weights, of any family that transformers knows.

Names and shapes are those of the model that transformers makes of a configuration, on no memory;
values are drawn block by
block. The tokenizer knows bytes and the family's special tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from typing_extensions import override

from vlmforge_recipes.llava.synthetic.files import Progress, write_safetensors
from vlmforge_recipes.llava.synthetic.tensors import Entry, Random

Json = dict[str, object]
_DRAWN = 1 << 20


@dataclass(frozen=True, slots=True)
class Repeated(Random):
    """The same values over and over: what is measured does not depend on them."""

    @override
    def blocks(self, seed: int, dtype: torch.dtype) -> Iterator[Tensor]:
        total = math.prod(self.shape)
        few = Random(self.name, (min(total, _DRAWN),), self.std, self.mean)
        values = torch.cat(list(few.blocks(seed, dtype)))
        for start in range(0, total, _DRAWN):
            yield values[: total - start]


@dataclass(frozen=True)
class Preset:
    """A model to draw.

    Attributes:
        config: Its config.json, but for ids of tokens.
        files: What lies beside it, by name: JSON, or text.
        special: Texts of the special tokens.
        image, end: Which of them stands for an image, and which ends an answer.
        ids: Texts of special tokens whose ids are at the top of config.json, by key.
    """

    config: Json
    files: Mapping[str, Json | str]
    special: tuple[str, ...]
    image: str
    end: str
    ids: Mapping[str, str] = field(default_factory=dict)


_SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_SMOL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<fake_token_around_image>", "<image>"),
    *("<end_of_utterance>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)


def _smolvlm(text: Json, vision: Json, *, scale: int, rows: int, tile: int) -> Preset:
    return Preset(
        config={
            "architectures": ["SmolVLMForConditionalGeneration"],
            "model_type": "smolvlm",
            "scale_factor": scale,
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "llama",
                "vocab_size": 49280,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                **text,
            },
            "vision_config": {
                "model_type": "smolvlm_vision",
                "image_size": tile,
                "hidden_act": "gelu_pytorch_tanh",
                **vision,
            },
        },
        files={
            "preprocessor_config.json": {
                "image_processor_type": "SmolVLMImageProcessor",
                "max_image_size": {"longest_edge": tile},
                "size": {"longest_edge": 4 * tile},
                "resample": 1,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
            "processor_config.json": {"image_seq_len": rows, "processor_class": "SmolVLMProcessor"},
            "chat_template.jinja": _SMOL_TEMPLATE,
        },
        special=_SMOL_TOKENS,
        image="<image>",
        end="<end_of_utterance>",
    )


_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_AROUND = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
_QWEN3_VL_2B = Preset(
    config={
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    files={
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 65536, "longest_edge": 16777216},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "chat_template.jinja": _QWEN_TEMPLATE,
    },
    special=("<|im_start|>", "<|im_end|>", *_AROUND.values(), "<|image_pad|>"),
    image="<|image_pad|>",
    end="<|im_end|>",
    ids=_AROUND,
)

MODELS: Mapping[str, Preset] = {
    "qwen3-vl-2b": _QWEN3_VL_2B,
    "smolvlm2-2.2b": _smolvlm(
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "rope_theta": 130000,
        },
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
        scale=3,
        rows=81,
        tile=384,
    ),
    "smolvlm2-256m": _smolvlm(
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 100000,
        },
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 16,
        },
        scale=4,
        rows=64,
        tile=512,
    ),
}
"""Shapes as they are published."""


def draw(folder: Path, preset: Preset, *, seed: int = 1) -> Path:
    """Write a checkpoint in bfloat16; returns its folder."""
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(preset.special)
    tokens = {name: tokenizer.token_to_id(name) for name in (preset.image, preset.end)}
    config = {**preset.config, "image_token_id": tokens[preset.image]}
    config |= {key: tokenizer.token_to_id(text) for key, text in preset.ids.items()}
    config["text_config"] = {**_section(config), "eos_token_id": tokens[preset.end]}
    for name, content in {**preset.files, "config.json": config}.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        (folder / name).write_text(text, "utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    entries = list(_entries(folder))
    progress = Progress(total=sum(entry.nbytes for entry in entries))
    partial = folder / "model.partial"
    write_safetensors(partial, entries, seed, progress)
    partial.rename(folder / "model.safetensors")
    return folder


def _section(config: Json) -> Json:
    text = config["text_config"]
    assert isinstance(text, dict)
    return text


def _tokenizer(special: tuple[str, ...]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return tokenizer


def _entries(folder: Path) -> Iterator[Entry]:
    """Every parameter of the model, by its name in memory."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    for name, tensor in model.named_parameters():
        yield Entry(name, torch.bfloat16, _law(name, tuple(tensor.shape)))


def _law(name: str, shape: tuple[int, ...]) -> Random:
    """Values that keep activations of order one."""
    if len(shape) == 1:
        is_scale = "norm" in name and name.endswith("weight")
        return Repeated(name, shape, 0.1, 1.0 if is_scale else 0.0)
    if "embed" in name and len(shape) < 4:
        return Repeated(name, shape, 0.5)
    gain = 3.0 if name.startswith("lm_head") else 1.0
    return Repeated(name, shape, gain / math.sqrt(math.prod(shape[1:])))
