"""Parity with torch and transformers' own layers where the goldens have no case.

For the layouts of the original code, whose text is split at image tags: several images, images in
the middle and at the end of a text, in several turns, of odd sizes and modes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import drawn_v1_6
from conftest import DATA, build_once, golden_engine
from original_models import Reference, reference
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from vlmforge.vl.constants import IMAGE_TOKEN

TOWERS = {
    "llava_v1_5_liuhaotian": "openai/clip-vit-large-patch14-336",
    "llava_v1_6_mistral_liuhaotian": "openai/clip-vit-large-patch14-336",
    "yi_vl": "checkpoint/vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl-6B-448",
}
DRAWN = {"v1.6 vicuna": drawn_v1_6.VICUNA, "v1.6 chatml": drawn_v1_6.CHATML}
T = IMAGE_TOKEN


@pytest.fixture(scope="module", params=[*TOWERS, *DRAWN])
def pair(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pipeline, Reference]]:
    name: str = request.param
    if name in TOWERS:
        engine = golden_engine(shared, name)
        original = reference(DATA / name / "checkpoint", DATA / name / TOWERS[name])
    else:
        folder = tmp_path_factory.mktemp("drawn")
        checkpoint = drawn_v1_6.write(folder, DRAWN[name])
        engine = build_once(folder / "engine", checkpoint, "--skip-goldens")
        original = reference(checkpoint, folder / drawn_v1_6.TOWER)
    with pipeline(engine, EngineConfig(threads=1, max_batch_size=1)) as pipe:
        yield pipe, original


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
