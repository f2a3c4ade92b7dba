"""Tiny random checkpoints of models that take patches, and the processor of transformers for them.

`drawn_qwen2_vl` and `drawn_qwen3_vl` are the families.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from drawn_models import CHATML, Drawn, bpe, size_of, token_id

# As published with Qwen2-VL and Qwen2.5-VL.
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
AROUND = ("<|vision_start|>", "<|vision_end|>")
TOKENIZER = bpe((*CHATML, *AROUND, "<|vision_pad|>", IMAGE, VIDEO))


@dataclass(frozen=True)
class Shape:
    """What differs between checkpoints; `text` and `vision` go over what they share.

    Attributes:
        model: Class of transformers.
        flat: The text's keys are at the top, as published before transformers 5.
        least, most: Pixels of an image.
    """

    model: str
    text: Mapping[str, object] = field(default_factory=dict)
    vision: Mapping[str, object] = field(default_factory=dict)
    tied: bool = False
    flat: bool = False
    least: int = 28 * 28 * 2
    most: int = 28 * 28 * 30
    seed: int = 1


def write(folder: Path, shape: Shape) -> Path:
    """The checkpoint's folder."""
    model = getattr(transformers, shape.model)
    text: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": size_of(TOKENIZER),
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "eos_token_id": token_id(TOKENIZER, "<|im_end|>"),
        **shape.text,
    }
    given = {key: value for key, value in text.items() if not key.startswith("rope")}
    rope = {**text["rope_scaling"], "rope_theta": text["rope_theta"]}
    config = model.config_class(
        text_config={**given, "rope_parameters": rope},
        vision_config=dict(shape.vision),
        image_token_id=token_id(TOKENIZER, IMAGE),
        video_token_id=token_id(TOKENIZER, VIDEO),
        vision_start_token_id=token_id(TOKENIZER, AROUND[0]),
        vision_end_token_id=token_id(TOKENIZER, AROUND[1]),
        tie_word_embeddings=shape.tied,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    drawn = Drawn(model, config, TOKENIZER, shape.seed, _files(shape))
    drawn.write(folder)
    if shape.flat:
        _flatten(folder, text)
    return folder


def _flatten(folder: Path, text: Mapping[str, object]) -> None:
    """The text's keys at the top, as the published files have them."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    del config["text_config"]
    config.update(text)
    path.write_text(json.dumps(config), "utf-8")


def _files(shape: Shape) -> dict[str, dict[str, object]]:
    """As they are published."""
    patch = shape.vision.get("patch_size", 14)
    return {
        "preprocessor_config.json": {
            "min_pixels": shape.least,  # wins over that of `size`
            "size": {"shortest_edge": 1, "longest_edge": shape.most},
            "patch_size": patch,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        },
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "additional_special_tokens": [*CHATML, *AROUND],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        "generation_config.json": {
            "bos_token_id": token_id(TOKENIZER, "<|endoftext|>"),
            "do_sample": True,
            "eos_token_id": [token_id(TOKENIZER, t) for t in ("<|im_end|>", "<|endoftext|>")],
            "temperature": 0.1,
            "top_k": 1,
        },
    }


class ImagesOnly:
    """What the processors do with texts and images; theirs need torchvision, for videos."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._image = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self._template = (folder / "chat_template.jinja").read_text("utf-8")

    def apply_chat_template(self, messages: list[Any], *, add_generation_prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def _processed(self, image: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        image, limits = image if isinstance(image, tuple) else (image, {})
        usual = self._image.size
        size = {
            "shortest_edge": limits.get("min_pixels", usual["shortest_edge"]),
            "longest_edge": limits.get("max_pixels", usual["longest_edge"]),
        }
        return dict(self._image(images=[image], size=size, return_tensors=return_tensors))

    def __call__(self, *, text: str, images: Any, return_tensors: str) -> dict[str, Any]:
        """`images` may each come with its limits of pixels."""
        given: dict[str, Any] = {}
        if images:
            each = [self._processed(image, return_tensors) for image in images]
            given = {name: torch.cat([one[name] for one in each]) for name in each[0]}
            for grid in given["image_grid_thw"].tolist():
                count = grid[0] * grid[1] * grid[2] // self._image.merge_size**2
                text = text.replace(IMAGE, "\0" * count, 1)  # `replace_image_token`
        ids = self._tokenizer(text.replace("\0", IMAGE), return_tensors=return_tensors).input_ids
        images_at = (ids == self._tokenizer.convert_tokens_to_ids(IMAGE)).int()
        return {"input_ids": ids, "mm_token_type_ids": images_at, **given}


def processor(folder: Path) -> ImagesOnly:
    """Of a checkpoint."""
    return ImagesOnly(folder)


@torch.no_grad()
def features(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """`[rows, layers * hidden]` of all images, of each layer that takes some."""
    found = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    return torch.cat((found.pooler_output, *getattr(found, "deepstack_features", ())), dim=-1)


@torch.no_grad()
def places(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """`[tokens, 3]`, where the tokens are."""
    found, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
    )
    rows: torch.Tensor = found[:, 0].T
    return rows
