"""The models whose text is split at image tags, as oracles: layers of torch and transformers.

A checkpoint in an original layout is read by plain torch and safetensors, and its parts are run one
after the other in float32.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import anyres_original

TOWER_INSIDE = "model.vision_tower.vision_tower.vision_model."
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "hidden_act"),
)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's shards, as float32."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return {name: tensor.float() for name, tensor in found.items()}


def fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor], *prefixes: str) -> Any:
    """The module with its weights from `state`, under whichever prefix they are."""
    wanted = {name for name in module.state_dict() if "position_ids" not in name}
    for prefix in prefixes:
        cut = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if wanted <= set(cut):
            module.load_state_dict({name: cut[name] for name in wanted}, strict=False)
            return module.eval()
    raise AssertionError(sorted(wanted)[:3])


def projector(state: Mapping[str, torch.Tensor]) -> torch.nn.Sequential:
    """`mm_projector` by its tensors: matrices are linear layers, vectors norms, gaps the GELU."""
    prefix = "model.mm_projector."
    weights = {
        int(name.removeprefix(prefix).removesuffix(".weight")): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and name.endswith(".weight")
    }
    layers: list[torch.nn.Module] = []
    for index in range(max(weights) + 1):
        weight = weights.get(index)
        if weight is None:
            layers.append(torch.nn.GELU())
        elif weight.ndim == 2:
            layers.append(torch.nn.Linear(weight.shape[1], weight.shape[0]))
        else:
            layers.append(torch.nn.LayerNorm(weight.shape[0]))
    made: torch.nn.Sequential = fill(torch.nn.Sequential(*layers), state, prefix)
    return made


@dataclass(frozen=True)
class Reference:
    """The model's layers as transformers writes them.

    `canvases` (width, height) and `newline` are those of images of any resolution, or None.
    """

    text: Any
    tower: Any
    project: torch.nn.Sequential
    processor: Any
    canvases: tuple[tuple[int, int], ...] | None
    newline: torch.Tensor | None

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """`[views, 3, H, W]` by the tower's own processor, which finds nothing to crop."""
        if self.canvases is None:
            views = [self._square(image.convert("RGB"))]
        else:
            side = self.processor.crop_size["height"]
            views = anyres_original.views(image, self.canvases, side)
        made = self.processor(images=views, return_tensors="pt")["pixel_values"]
        assert isinstance(made, torch.Tensor)
        return made

    def _square(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        fill_colour = tuple(int(mean * 255) for mean in self.processor.image_mean)
        square = Image.new("RGB", (side, side), fill_colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def features(self, image: Image.Image) -> torch.Tensor:
        """`[tokens, hidden]`."""
        states = self.tower(self.pixels(image), output_hidden_states=True).hidden_states
        made: torch.Tensor = self.project(states[-2][:, 1:])
        if self.canvases is None or self.newline is None:
            return made[0]
        canvas = anyres_original.best_resolution(image.size, self.canvases)
        tile = self.processor.crop_size["height"]
        return anyres_original.merge(made, image.size, canvas, tile, self.newline)

    def logits(self, pieces: Sequence[list[int]], images: Sequence[Image.Image]) -> Any:
        """Of a prompt whose text is in pieces between its images."""
        embed = self.text.get_input_embeddings()
        with torch.no_grad():
            rows = [embed(torch.tensor(pieces[0], dtype=torch.int64))]
            for piece, image in zip(pieces[1:], images, strict=True):
                rows += [self.features(image), embed(torch.tensor(piece, dtype=torch.int64))]
            return self.text(inputs_embeds=torch.cat(rows)[None]).logits[0].numpy()


def reference(checkpoint: Path, tower: Path) -> Reference:
    """The oracle of a checkpoint; `tower` is the folder that its `mm_vision_tower` names."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    text = LlamaConfig(
        **{key: config[key] for key in _TEXT_KEYS},
        rope_parameters=rope,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    vision = json.loads((tower / "config.json").read_text("utf-8"))
    vision = vision.get("vision_config", vision)
    state = tensors(checkpoint)
    anyres = config["image_aspect_ratio"] == "anyres"
    return Reference(
        fill(LlamaForCausalLM(text), state, ""),
        fill(
            CLIPVisionModel(CLIPVisionConfig(**vision)),
            state if anyres else tensors(tower),
            *((TOWER_INSIDE,) if anyres else ("", "vision_model.")),
        ),
        projector(state),
        AutoImageProcessor.from_pretrained(tower, backend="pil"),
        _canvases(config["image_grid_pinpoints"]) if anyres else None,
        state["model.image_newline"] if anyres else None,
    )


def _canvases(pinpoints: object) -> tuple[tuple[int, int], ...]:
    pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    return tuple((width, height) for width, height in pairs)
