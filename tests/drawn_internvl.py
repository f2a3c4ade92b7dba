"""Tiny random checkpoints of InternVL, and the processor of transformers for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)

from drawn_models import CHATML, Drawn, bpe, size_of, token_id

TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER = bpe((*CHATML, "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<video>"))


@dataclass(frozen=True)
class Shape:
    """What differs between checkpoints; `text` and `vision` go over what they share."""

    text: Mapping[str, object]
    vision: Mapping[str, object] = field(default_factory=dict)
    tied: bool = True
    most_tiles: int = 12
    seed: int = 1

    @property
    def side(self) -> int:
        return int(str(self.vision.get("image_size", 28)))

    @property
    def rows(self) -> int:
        return (self.side // int(str(self.vision.get("patch_size", 7)))) ** 2 // 4


SHAPES: Mapping[str, Shape] = {
    # Norms of heads, whose width is none of hidden_size / num_attention_heads.
    "qwen3": Shape({"model_type": "qwen3", "hidden_size": 48, "head_dim": 32}, seed=5),
    # Biases, no groups of heads, an output matrix of its own, a norm behind the tower.
    "qwen2": Shape(
        {"model_type": "qwen2", "num_key_value_heads": 4, "hidden_size": 64},
        {"image_size": 56, "patch_size": 14, "attention_bias": True, "use_mean_pooling": False},
        tied=False,
        most_tiles=4,
        seed=2,
    ),
    "llama": Shape(
        {
            "model_type": "llama",
            "num_key_value_heads": 1,
            "hidden_size": 64,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        tied=False,
        most_tiles=6,
        seed=4,
    ),
}


def write(folder: Path, shape: Shape) -> Path:
    """The checkpoint's folder."""
    config = InternVLConfig(
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
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": size_of(TOKENIZER),
            "max_position_embeddings": 2048,
            "tie_word_embeddings": shape.tied,
            "eos_token_id": token_id(TOKENIZER, "<|im_end|>"),
            **shape.text,
        },
        image_token_id=token_id(TOKENIZER, "<IMG_CONTEXT>"),
        image_seq_length=shape.rows,
        tie_word_embeddings=shape.tied,
    )
    drawn = Drawn(InternVLForConditionalGeneration, config, TOKENIZER, shape.seed, _files(shape))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return drawn.write(folder)


def _files(shape: Shape) -> dict[str, dict[str, object]]:
    """As they are published."""
    image: dict[str, object] = {
        "crop_size": None,
        "crop_to_patches": False,
        "data_format": "channels_first",
        "default_to_square": True,
        "device": None,
        "disable_grouping": None,
        "do_center_crop": None,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "image_std": [0.229, 0.224, 0.225],
        "input_data_format": None,
        "max_patches": shape.most_tiles,
        "min_patches": 1,
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "return_tensors": None,
        "size": {"height": shape.side, "width": shape.side},
    }
    return {
        "preprocessor_config.json": image,
        "processor_config.json": {
            "image_seq_length": shape.rows,
            "processor_class": "InternVLProcessor",
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "additional_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>"],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "context_image_token": "<IMG_CONTEXT>",
            "end_image_token": "</img>",
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "extra_special_tokens": TOKENS,
            "model_max_length": 8192,
            "pad_token": "<|endoftext|>",
            "processor_class": "InternVLProcessor",
            "return_token_type_ids": False,
            "split_special_tokens": False,
            "start_image_token": "<img>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
            "video_token": "<video>",
        },
    }


class _ImagesOnly(InternVLProcessor):  # type: ignore[misc]
    """Without the processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, *_: object) -> None:
        return


def processor(folder: Path) -> Any:
    """The processor of transformers for a checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image = GotOcr2ImageProcessorPil.from_pretrained(folder)
    rows = InternVLConfig.from_pretrained(folder).image_seq_length
    return _ImagesOnly(image, tokenizer, None, rows, (folder / "chat_template.jinja").read_text())
