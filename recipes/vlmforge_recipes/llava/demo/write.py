"""A trained demo model as a checkpoint in the original LLaVA v1.5 layout, in float16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlmforge_recipes.llava.demo.model import DemoModel
from vlmforge_recipes.llava.demo.spec import TOWER
from vlmforge_recipes.llava.synthetic.configs import (
    clip_preprocessor,
    clip_tower_config,
    write_json,
    write_original_configs,
)
from vlmforge_recipes.llava.synthetic.spec import SyntheticSpec
from vlmforge_recipes.llava.synthetic.tokenizer import write_original_tokenizer

_WEIGHTS = "model.safetensors"
_UNUSED_SCALE = 0.3


def write_descriptions(folder: Path, spec: SyntheticSpec, tokenizer: bytes) -> None:
    """All files but the weights."""
    tower = folder / TOWER
    tower.mkdir(parents=True, exist_ok=True)
    write_original_configs(folder, spec, tower=TOWER)
    write_original_tokenizer(folder, tokenizer)
    write_json(tower / "config.json", clip_tower_config(spec.vision))
    write_json(tower / "preprocessor_config.json", clip_preprocessor(spec.vision.image_size))


def write_weights(folder: Path, model: DemoModel) -> None:
    """The weights, under their published names."""
    text = dict(_language(model))
    save_file(text, folder / _WEIGHTS, metadata={"format": "pt"})
    tower = dict(_tower(model.tower.state_dict()))
    save_file(tower, folder / TOWER / _WEIGHTS, metadata={"format": "pt"})


def _language(model: DemoModel) -> Iterator[tuple[str, Tensor]]:
    for name, value in model.decoder.state_dict().items():
        if name != "lm_head.weight":  # tied to the embedding
            yield name, _half(value)
    for name, value in model.projector.state_dict().items():
        yield f"model.mm_projector.{name}", _half(value)


def _tower(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tower, with the last layer that CLIP has and LLaVA never runs.

    That one is random and strong: features behind it are of no use, so that nobody takes the
    output of a wrong layer unnoticed.
    """
    chance = torch.Generator().manual_seed(0)
    named = {f"vision_model.{n.removeprefix('vision_model.')}": v for n, v in state.items()}
    last = 1 + max(
        int(name.split(".layers.")[1].split(".")[0]) for name in named if _in_layer(name)
    )
    for name, value in named.items():
        yield name, _half(value)
        if ".layers.0." in name:
            values = torch.randn(value.shape, generator=chance) * _UNUSED_SCALE
            yield name.replace(".layers.0.", f".layers.{last}."), _half(values)


def _in_layer(name: str) -> bool:
    return ".layers." in name


def _half(value: Tensor) -> Tensor:
    return value.detach().cpu().to(torch.float16).contiguous().clone()
