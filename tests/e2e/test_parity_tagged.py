"""Parity with torch and transformers' own layers where the goldens have no case.

For the layouts of the original code, whose text is split at image tags: several images, images in
the middle and at the end of a text, in several turns, of odd sizes and modes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from conftest import DATA, golden_engine
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from vlmforge.vl.constants import IMAGE_TOKEN

TOWERS = {
    "llava_v1_5_liuhaotian": "openai/clip-vit-large-patch14-336",
    "yi_vl": "checkpoint/vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl-6B-448",
}
T = IMAGE_TOKEN


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    return {name: tensor.float() for name, tensor in found.items()}


def fill(module: torch.nn.Module, state: dict[str, torch.Tensor], *prefixes: str) -> Any:
    """The module with its weights from `state`, under whichever prefix they are."""
    wanted = set(module.state_dict())
    for prefix in prefixes:
        cut = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if wanted - {name for name in wanted if "position_ids" in name} <= set(cut):
            module.load_state_dict({name: cut[name] for name in wanted if name in cut}, False)
            return module.eval()
    raise AssertionError(sorted(wanted)[:3])


def projector(state: dict[str, torch.Tensor]) -> torch.nn.Sequential:
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
    """The model's layers as transformers writes them, in float32."""

    text: Any
    tower: Any
    project: torch.nn.Sequential
    processor: Any

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """On a square of the mean's colour, then the tower's own processor."""
        image = image.convert("RGB")
        side = max(image.size)
        fill_colour = tuple(int(mean * 255) for mean in self.processor.image_mean)
        square = Image.new("RGB", (side, side), fill_colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        made = self.processor(images=square, return_tensors="pt")["pixel_values"]
        assert isinstance(made, torch.Tensor)
        return made

    def features(self, image: Image.Image) -> torch.Tensor:
        states = self.tower(self.pixels(image), output_hidden_states=True).hidden_states
        made: torch.Tensor = self.project(states[-2][:, 1:])[0]
        return made

    def logits(self, pieces: Sequence[list[int]], images: Sequence[Image.Image]) -> Any:
        """Of a prompt whose text is in pieces between its images."""
        embed = self.text.get_input_embeddings()
        with torch.no_grad():
            rows = [embed(torch.tensor(pieces[0], dtype=torch.int64))]
            for piece, image in zip(pieces[1:], images, strict=True):
                rows += [self.features(image), embed(torch.tensor(piece, dtype=torch.int64))]
            return self.text(inputs_embeds=torch.cat(rows)[None]).logits[0].numpy()


def reference(name: str) -> Reference:
    folder = DATA / name
    config = json.loads((folder / "checkpoint/config.json").read_text("utf-8"))
    keys = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "hidden_act"),
    )
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    text = LlamaConfig(
        **{key: config[key] for key in keys},
        rope_parameters=rope,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    vision = json.loads((folder / TOWERS[name] / "config.json").read_text("utf-8"))
    vision = vision.get("vision_config", vision)
    state, tower = tensors(folder / "checkpoint"), tensors(folder / TOWERS[name])
    return Reference(
        fill(LlamaForCausalLM(text), state, ""),
        fill(CLIPVisionModel(CLIPVisionConfig(**vision)), tower, "", "vision_model."),
        projector(state),
        AutoImageProcessor.from_pretrained(folder / TOWERS[name], backend="pil"),
    )


@pytest.fixture(scope="module", params=TOWERS)
def pair(request: pytest.FixtureRequest, shared: Path) -> Iterator[tuple[Pipeline, Reference]]:
    config = EngineConfig(threads=1, max_batch_size=1)
    with pipeline(golden_engine(shared, request.param), config) as pipe:
        yield pipe, reference(request.param)


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng((width, height))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    return image.resize((width, height)).convert(mode)


WIDE, TALL, TINY, GREY = drawn(601, 37), drawn(13, 290), drawn(1, 1), drawn(97, 61, "L")


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    pictures = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


CASES = {
    "two images": ([user("Compare them.", WIDE, TALL)], [WIDE, TALL]),
    "in the middle": ([user(f"Look at {T} and tell me 图 more.", TINY)], [TINY]),
    "at the end, and beside another": ([user(f"a{T}{T}", GREY, WIDE)], [GREY, WIDE]),
    "in two turns": ([user("q1", GREY), said("a1"), user(f"and {T}?", TALL)], [GREY, TALL]),
    "specials typed": ([user("<s></s> <|im_start|>x<|endoftext|> ### a", TINY)], [TINY]),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_whole_prompt(pair: tuple[Pipeline, Reference], case: str) -> None:
    pipe, original = pair
    messages, images = CASES[case]
    rendered = pipe.render(messages)
    starts = [span.start for span in rendered.image_spans]
    ends = [0, *(span.start + span.length for span in rendered.image_spans)]
    ids = list(rendered.token_ids)
    pieces = [ids[a:b] for a, b in zip(ends, [*starts, len(ids)], strict=True)]
    config = GenerationConfig(max_new_tokens=1, output_logits="all")
    response = pipe(messages, gen_config=config)
    assert isinstance(response, Response)
    assert response.logits is not None
    expected = original.logits(pieces, images)
    assert len(response.logits) == len(expected) == len(ids)
    assert expected.std() > 1  # a flat output would prove nothing
    np.testing.assert_allclose(response.logits, expected, atol=5e-3, rtol=0)


def test_pixels_of_odd_images(pair: tuple[Pipeline, Reference]) -> None:
    pipe, original = pair
    for image in (WIDE, TALL, TINY, GREY):
        found = pipe._engine.prepare_image(image).pixel_values
        np.testing.assert_allclose(found, original.pixels(image).numpy(), atol=1e-5, rtol=0)
