"""Engines of checkpoints that are drawn on the spot, and transformers on the same checkpoints.

A family is a module `drawn_*` with `SHAPES`, `write(folder, shape)` and `processor(folder)`, and
where its model has them in other places `features(model, inputs)` and `places(model, inputs)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import torch
from filelock import FileLock
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText

import drawn_idefics3
import drawn_internvl
import drawn_qwen2_vl
import drawn_qwen3_vl
from conftest import build_once, kernels_for_one_gpu
from golden_models import Tolerances
from vlmforge import GenerationConfig, Pipeline
from vlmforge.inputs.messages import parse_prompt
from vlmforge.runner.features import FeatureCache

FAMILIES: Mapping[str, ModuleType] = {
    "internvl": drawn_internvl,
    "idefics3": drawn_idefics3,
    "qwen2_vl": drawn_qwen2_vl,
    "qwen3_vl": drawn_qwen3_vl,
}
STEPS = 12


def picture(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Noise with a slope, so that tiles differ."""
    generator = np.random.default_rng((width, height, seed))
    noise = generator.integers(0, 160, (height, width, 3))
    slope = np.linspace(0, 95, width)[None, :, None]
    return PIL.Image.fromarray((noise + slope).astype(np.uint8))


WIDE, TALL, SMALL = picture(90, 40), picture(33, 70), picture(20, 20)
CASES: Mapping[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": [WIDE, "What is shown here?"]}],
    "middle": [{"role": "user", "content": ["Look: ", TALL, " What is it?"]}],
    "several": [{"role": "user", "content": [TALL, WIDE, SMALL, "Compare."]}],
    "turns": [
        {"role": "system", "content": ["Be brief."]},
        {"role": "user", "content": [SMALL, "What is it?"]},
        {"role": "assistant", "content": ["A picture."]},
        {"role": "user", "content": ["And this one? ", WIDE]},
    ],
    "text": [{"role": "user", "content": ["Write a line."]}],
}


def checkpoint(shared: Path, family: str, shape: str) -> Path:
    """The checkpoint, written once for a run."""
    folder, module = shared / f"{family}_{shape}", FAMILIES[family]
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").exists():
            module.write(folder, module.SHAPES[shape])
    return folder


def engine(shared: Path, family: str, shape: str, *options: str) -> Path:
    """Its engine, built once for a run."""
    name = "".join(options).replace("--", "_")
    path = shared / f"{family}_{shape}{name}.engine"
    if options or shape != next(iter(FAMILIES[family].SHAPES)):
        options = (*options, "--skip-goldens")  # the first one's are verified
    with kernels_for_one_gpu() if "cuda" in options else nullcontext():
        return build_once(path, checkpoint(shared, family, shape), *options)


def ours(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Messages as the pipeline takes them; an image may come with its limits of pixels."""

    def block(item: object) -> dict[str, object]:
        item, limits = item if isinstance(item, tuple) else (item, {})
        kind = "text" if isinstance(item, str) else "image"
        return {"type": kind, kind: item, **limits}

    return [
        {"role": m["role"], "content": [block(item) for item in m["content"]]} for m in messages
    ]


@dataclass
class Original:
    """The model and the processor of transformers."""

    folder: Path
    family: str
    _answers: dict[str, tuple[object, Any]] = field(default_factory=dict)

    @cached_property
    def model(self) -> Any:
        found = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32)
        return found.eval()

    @cached_property
    def processor(self) -> Any:
        return FAMILIES[self.family].processor(self.folder)

    def inputs(self, messages: Sequence[Mapping[str, Any]]) -> Any:
        """What the model takes."""
        blocks = [
            {
                "role": message["role"],
                "content": [
                    {"type": "text", "text": item} if isinstance(item, str) else {"type": "image"}
                    for item in message["content"]
                ],
            }
            for message in messages
        ]
        text = self.processor.apply_chat_template(blocks, add_generation_prompt=True)
        images = [i for m in messages for i in m["content"] if not isinstance(i, str)]
        return self.processor(text=text, images=images or None, return_tensors="pt")

    @torch.no_grad()
    def features(self, inputs: Any) -> NDArray[np.float32]:
        """`[rows, hidden]` of all images."""
        own = getattr(FAMILIES[self.family], "features", None)
        if own is not None:
            return np.asarray(own(self.model, inputs))
        found = self.model.model.get_image_features(inputs["pixel_values"]).pooler_output
        views = found if isinstance(found, list | tuple) else [found]
        return torch.cat([view.reshape(-1, view.shape[-1]) for view in views]).numpy()

    def places(self, inputs: Any) -> NDArray[np.int64] | None:
        """`[tokens, axes]`, where the tokens are; None: one after the other."""
        own = getattr(FAMILIES[self.family], "places", None)
        return None if own is None else np.asarray(own(self.model, inputs))

    @torch.no_grad()
    def logits(self, inputs: Any) -> NDArray[np.float32]:
        """`[tokens, vocabulary]` of the prompt."""
        return np.asarray(self.model(**inputs).logits[0])

    def answer(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], NDArray[np.float32]]:
        """`greedy` of a case, once for all who ask."""
        case = repr(messages)  # with the addresses of its images, which are kept
        if case not in self._answers:
            self._answers[case] = messages, self.greedy(self.inputs(messages))
        return self._answers[case][1]

    @torch.no_grad()
    def greedy(self, inputs: Any, steps: int = STEPS) -> tuple[list[int], NDArray[np.float32]]:
        """Tokens without the one that ends the answer, and how clear each choice was."""
        found = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=steps,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = found.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        best = torch.stack(found.scores)[:, 0].topk(2).values
        ends = self.model.generation_config.eos_token_id
        if tokens[-1] in (ends if isinstance(ends, list) else [ends]):
            tokens.pop()
        return tokens, (best[:, 0] - best[:, 1]).numpy()


def check_stages(
    pipe: Pipeline, original: Original, messages: list[dict[str, Any]], limits: Tolerances
) -> None:
    """Ids, pixels, features and the prompt's logits of one case."""
    held, inputs = pipe._engine, original.inputs(messages)
    rendered = pipe.render(ours(messages))
    assert list(rendered.token_ids) == inputs["input_ids"][0].tolist()
    conversation = parse_prompt(ours(messages))
    images = [
        held.prepare_image(held.open_image(i.source).decode(), asked=i.pixel_range)
        for i in conversation.images
    ]
    found, _ = FeatureCache(held.encode, batch=2).get(images) if images else ([], 0)
    if images:
        views = [image.pixel_values for image in images]
        if len({view.shape[1:] for view in views}) > 1:
            views = [view.reshape(-1, view.shape[-1]) for view in views]
        pixels = np.concatenate(views)
        theirs = inputs["pixel_values"].reshape(pixels.shape).numpy()
        np.testing.assert_allclose(pixels, theirs, atol=limits.pixels, rtol=0)
        rows = np.concatenate(found)
        np.testing.assert_allclose(rows, original.features(inputs), atol=limits.features, rtol=0)
    given = held.decoder_input(rendered, found)
    np.testing.assert_array_equal(given.places, original.places(inputs))
    expected = original.logits(inputs)
    assert expected.std() > 1
    logits = held.prefill(held.options.whole_place, given, 0, logits="all")
    np.testing.assert_allclose(logits, expected, atol=limits.logits, rtol=0)


def check_answer(
    pipe: Pipeline, original: Original, messages: list[dict[str, Any]], margin: float = 0.0
) -> None:
    """Greedy tokens of one case, up to the first whose choice is no clearer than `margin`."""
    tokens, clear = original.answer(messages)
    if margin:
        tokens = tokens[: int(np.argmax(clear < margin)) if (clear < margin).any() else None]
    found = pipe(ours(messages), gen_config=GenerationConfig(max_new_tokens=STEPS))
    assert found.token_ids[: len(tokens)] == tokens  # type: ignore[union-attr]
