"""Tiny random checkpoints of Idefics3 and SmolVLM, and the processor of transformers for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from drawn_models import Drawn, bpe, size_of, token_id

_GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
TOKENIZER = bpe(
    (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>"),
        *("<image>", "<end_of_utterance>", "<global-img>", *_GRID),
    )
)
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """What differs between checkpoints; `text` and `vision` go over what they share."""

    smol: bool
    text: Mapping[str, object] = field(default_factory=dict)
    vision: Mapping[str, object] = field(default_factory=dict)
    factor: int = 2
    longest: int = 3
    splits: bool = True
    tied: bool = True
    seed: int = 1

    @property
    def side(self) -> int:
        return int(str(self.vision.get("image_size", 28)))

    @property
    def rows(self) -> int:
        return (self.side // int(str(self.vision.get("patch_size", 7))) // self.factor) ** 2


SHAPES: Mapping[str, Shape] = {
    "smolvlm": Shape(smol=True, text={"num_attention_heads": 2, "num_key_value_heads": 1}, seed=5),
    "idefics3": Shape(
        smol=False,
        text={
            "num_key_value_heads": 4,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        vision={"image_size": 42, "patch_size": 14, "hidden_act": "gelu"},
        factor=3,
        longest=2,
        tied=False,
        seed=3,
    ),
    # One view of every image.
    "whole": Shape(smol=True, text={"num_key_value_heads": 1}, splits=False, seed=3),
}


def write(folder: Path, shape: Shape) -> Path:
    """The checkpoint's folder."""
    model, config_class = (
        (SmolVLMForConditionalGeneration, SmolVLMConfig)
        if shape.smol
        else (Idefics3ForConditionalGeneration, Idefics3Config)
    )
    config = config_class(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            **shape.vision,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 100000.0,
            "rms_norm_eps": 1e-5,
            "vocab_size": size_of(TOKENIZER),
            "max_position_embeddings": 2048,
            "tie_word_embeddings": shape.tied,
            "bos_token_id": token_id(TOKENIZER, "<|im_start|>"),
            "eos_token_id": token_id(TOKENIZER, "<end_of_utterance>"),
            "pad_token_id": token_id(TOKENIZER, "<|im_end|>"),
            **shape.text,
        },
        image_token_id=token_id(TOKENIZER, "<image>"),
        scale_factor=shape.factor,
        tie_word_embeddings=shape.tied,
    )
    drawn = Drawn(model, config, TOKENIZER, shape.seed, _files(shape))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return drawn.write(folder)


def _files(shape: Shape) -> dict[str, dict[str, object]]:
    """As they are published."""
    name = "SmolVLM" if shape.smol else "Idefics3"
    return {
        "preprocessor_config.json": {
            "do_convert_rgb": True,
            "do_image_splitting": shape.splits,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": f"{name}ImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "max_image_size": {"longest_edge": shape.side},
            "processor_class": f"{name}Processor",
            "resample": 1,
            "rescale_factor": 0.00392156862745098,
            "size": {"longest_edge": shape.longest * shape.side},
            **({"video_sampling": {"fps": 1, "max_frames": 64}} if shape.smol else {}),
        },
        "processor_config.json": {
            "image_seq_len": shape.rows,
            "processor_class": f"{name}Processor",
        },
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "additional_special_tokens": [
                "<fake_token_around_image>",
                "<image>",
                "<end_of_utterance>",
            ],
            "bos_token": "<|im_start|>",
            "clean_up_tokenization_spaces": False,
            "end_of_utterance_token": "<end_of_utterance>",
            "eos_token": "<end_of_utterance>",
            "extra_special_tokens": {
                "end_of_utterance_token": "<end_of_utterance>",
                "fake_image_token": "<fake_token_around_image>",
                "global_image_token": "<global-img>",
                "image_token": "<image>",
            },
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
            "legacy": False,
            "model_max_length": 8192,
            "pad_token": "<|im_end|>",
            "processor_class": f"{name}Processor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "truncation_side": "left",
            "unk_token": "<|endoftext|>",
            "vocab_size": 49152,
        },
    }


def processor(folder: Path) -> Any:
    """The processor of transformers for a checkpoint.

    That of SmolVLM is of Idefics3's text and needs packages for videos to be made at all.
    """
    own = json.loads((folder / "processor_config.json").read_text("utf-8"))
    smol = own["processor_class"] == "SmolVLMProcessor"
    image = SmolVLMImageProcessorPil if smol else Idefics3ImageProcessorPil
    return Idefics3Processor(
        image.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        own["image_seq_len"],
        (folder / "chat_template.jinja").read_text("utf-8"),
    )
