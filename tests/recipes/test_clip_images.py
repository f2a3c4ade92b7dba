"""Image processors' configurations give the pixels of transformers, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge.vl.preprocess import preprocess
from vlmforge_builder.blocks.vision import VisionConfig
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_recipes.clip_images import read_image_policy
from vlmforge_recipes.llava.anyres import hf_anyres

SIDE = 28
TOWER = VisionConfig(SIDE, 14, 8, 8, 1, 1, 1e-5, "gelu", keep_class_token=False)
THEIRS = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "LlavaNextImageProcessor": LlavaNextImageProcessorPil,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28]]

LENGTHS = st.sampled_from([SIDE] * 7 + [32, 20])
SIZES = st.one_of(
    LENGTHS,
    st.builds(lambda edge: {"shortest_edge": edge}, LENGTHS),
    st.builds(lambda h, w: {"height": h, "width": w}, LENGTHS, LENGTHS),
    st.builds(lambda h, w: [h, w], LENGTHS, LENGTHS),
    st.sampled_from(
        [
            {"shortest_edge": SIDE, "longest_edge": 2 * SIDE},
            {"longest_edge": SIDE},
            {"max_height": SIDE, "max_width": SIDE},
        ]
    ),
)
CROPS = st.one_of(LENGTHS, st.builds(lambda h, w: {"height": h, "width": w}, LENGTHS, LENGTHS))
MEANS = st.sampled_from([[0.5, 0.4, 0.3], [0.48145466, 0.4578275, 0.40821073], [0.5, 0.5, 0.5]])
CONFIGS = st.fixed_dictionaries(
    {"size": SIZES, "crop_size": CROPS, "do_pad": st.booleans()},
    optional={
        "do_resize": st.sampled_from([True] * 5 + [False]),
        "do_center_crop": st.booleans(),
        "do_rescale": st.booleans(),
        "do_normalize": st.booleans(),
        "resample": st.integers(0, 5),
        "rescale_factor": st.sampled_from([1 / 255, 0.01, 1.0]),
        "image_mean": MEANS,
        "image_std": MEANS,
    },
)
IMAGES = st.builds(
    lambda w, h, seed: Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    ),
    *(st.integers(9, 90), st.integers(9, 90), st.integers(0, 5)),
)


def ours(kind: str, values: dict[str, Any], image: Image.Image) -> NDArray[np.float32]:
    reader = ConfigReader(
        {"image_processor_type": kind, **values}, Path("preprocessor_config.json")
    )
    if kind == "LlavaNextImageProcessor":
        return preprocess(image, hf_anyres(reader, TOWER, reader))
    return preprocess(image, read_image_policy(reader, image_size=SIDE, pad_to_square=False))


def theirs(kind: str, values: dict[str, Any], image: Image.Image) -> NDArray[np.float32]:
    pixels = THEIRS[kind](**values)(image, return_tensors="np")["pixel_values"]
    return np.asarray(pixels[0] if pixels.ndim == 5 else pixels, np.float32)


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "LlavaImageProcessor"])
@settings(max_examples=120)
@given(values=CONFIGS, image=IMAGES)
def test_one_view_is_that_of_transformers_or_refused(
    kind: str, values: dict[str, Any], image: Image.Image
) -> None:
    try:
        pixels = ours(kind, values, image)
    except CheckpointError:
        return
    np.testing.assert_allclose(pixels, theirs(kind, values, image), atol=1e-5, rtol=1e-5)


@settings(max_examples=60)
@given(values=CONFIGS, image=IMAGES)
def test_tiles_are_those_of_transformers_or_refused(
    values: dict[str, Any], image: Image.Image
) -> None:
    kind, values = "LlavaNextImageProcessor", {**values, "image_grid_pinpoints": PINPOINTS}
    try:
        pixels = ours(kind, values, image)
    except CheckpointError:
        return
    np.testing.assert_allclose(pixels, theirs(kind, values, image), atol=1e-5, rtol=1e-5)


PUBLISHED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
BUILDS: tuple[dict[str, Any], ...] = (
    {},
    {"do_pad": True},
    {"do_pad": True, "do_center_crop": False},
    {"do_pad": True, "size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
    {"size": {"height": SIDE, "width": SIDE}},
    {"size": [SIDE, SIDE], "do_center_crop": False},
    {"size": 40},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_pad": True, "do_rescale": False, "do_normalize": False},
    {"image_mean": 0.5, "image_std": 0.25},
    *({"resample": number} for number in range(6)),
)


@pytest.mark.parametrize("values", BUILDS, ids=str)
def test_what_can_be_taken_is_taken(values: dict[str, Any]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    values = {**PUBLISHED, **values}
    np.testing.assert_allclose(
        ours("LlavaImageProcessor", values, image),
        theirs("LlavaImageProcessor", values, image),
        atol=1e-5,
    )


def test_padding_differs_from_cutting() -> None:
    """Were `do_pad` left out of account, the picture's sides would be gone."""
    image = Image.new("RGB", (90, 30))
    padded = ours("LlavaImageProcessor", {**PUBLISHED, "do_pad": True}, image)
    assert not np.array_equal(padded, ours("LlavaImageProcessor", PUBLISHED, image))
    cut = ours("CLIPImageProcessor", {**PUBLISHED, "do_pad": True}, image)
    assert np.array_equal(cut, ours("CLIPImageProcessor", PUBLISHED, image))


REFUSED = (
    ({"do_resize": False}, "do_resize: false"),
    ({"do_center_crop": False}, "do_center_crop: false"),
    ({"crop_size": 20}, "crop_size (20, 20)"),
    ({"size": {"height": 20, "width": 28}}, "size (20, 28)"),
    ({"resample": 6}, "resample: 6"),
)


@pytest.mark.parametrize(("values", "found"), REFUSED, ids=str)
def test_what_cannot_be_taken_is_named(values: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ours("LlavaImageProcessor", {**PUBLISHED, **values}, Image.new("RGB", (50, 40)))
    assert found in caught.value.found


WRONG = (
    *(("size", value) for value in ("28", True, {"longest_edge": 28}, {}, [28], -1.5)),
    *(("crop_size", value) for value in ("28", {"height": 28}, [28, 28, 28], [28, -28], 0)),
    *(("image_mean", value) for value in ("x", [1, 2], [1, 2, "3"], [1, 2, float("nan")], True)),
    *(("image_std", value) for value in ([1, 1, 0], 0, [1, 1, -1])),
    *(("resample", value) for value in ("3", 3.0, True)),
    *(("do_pad", value) for value in ("true", 1)),
    *(("do_resize", value) for value in ("false", 0)),
    *(("rescale_factor", value) for value in ("0.1", float("inf"))),
)


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_values_of_a_wrong_type_are_errors(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        ours("LlavaImageProcessor", {**PUBLISHED, key: value}, Image.new("RGB", (50, 40)))
    assert not isinstance(caught.value, UnsupportedModelError)
    assert key in caught.value.summary
