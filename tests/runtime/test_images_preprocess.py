"""Pixel values: bit for bit those of the original processors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

import anyres_original
from conftest import examples
from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.images.anyres import AnyRes
from vlmforge.engine.images.center_crop import CenterCrop
from vlmforge.engine.images.pad_square import PadSquare
from vlmforge.engine.images.pixels import PixelFormat
from vlmforge.engine.images.stretch import Stretch
from vlmforge.engine.images.tiling import Tiling, UnpaddedLines, view_count
from vlmforge.errors import ImageError
from vlmforge.vl import load_image
from vlmforge.vl.preprocess import preprocess

DATA = Path(__file__).parents[1] / "data"
MEAN_COLOUR = (122, 116, 104)
FORMAT = PixelFormat(
    resample="bicubic",
    rescale_factor=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    background=(255, 255, 255),
)
CENTER_CROP = CenterCrop(FORMAT, shortest_edge=168, crop=(168, 168))
PAD_SQUARE = PadSquare(FORMAT, shortest_edge=336, crop=(336, 336), pad_fill=MEAN_COLOUR)
STRETCH = Stretch(FORMAT, target=(28, 28))
ANYRES = AnyRes(
    FORMAT,
    Tiling(
        tile=28,
        canvases=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)),
        fill=(0, 0, 0),
        side=2,
        view_rows=5,
        merge=UnpaddedLines(),
    ),
)
# What becomes of one tile of it.
TILE = CenterCrop(FORMAT, shortest_edge=28, crop=(28, 28))
POLICIES: tuple[ImagePolicy, ...] = (CENTER_CROP, PAD_SQUARE, STRETCH, ANYRES)
GOLDENS = sorted(
    (folder, path.stem.removeprefix("image_"))
    for folder in ("llava_1_5_hf", "llava_v1_5_liuhaotian")
    for path in (DATA / folder).glob("image_*.npz")
)


def filtered(resample: str) -> PixelFormat:
    return structs.replace(FORMAT, resample=resample)


def original(image: Image.Image, policy: CenterCrop | PadSquare) -> np.ndarray:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": policy.shortest_edge},
        crop_size={"height": policy.crop[0], "width": policy.crop[1]},
        resample=Image.Resampling[policy.format.resample.upper()],
        image_mean=policy.format.mean,
        image_std=policy.format.std,
        rescale_factor=policy.format.rescale_factor,
    )
    return np.asarray(processor(image, return_tensors="np")["pixel_values"])


def padded(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    rgb = image.convert("RGB")
    side = max(rgb.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return square


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


def test_the_goldens_are_there() -> None:
    assert len(GOLDENS) == 5


@pytest.mark.parametrize(("folder", "name"), GOLDENS)
def test_goldens(folder: str, name: str) -> None:
    policy = CENTER_CROP if folder == "llava_1_5_hf" else PAD_SQUARE
    golden = np.load(DATA / folder / f"image_{name}.npz")
    ours = preprocess(load_image(DATA / "images" / f"{name}.png"), policy)
    assert_same_bits(ours[0, :, :: int(golden["row_step"])], golden["pixel_values"])


def test_the_policy_is_that_of_the_golden_checkpoint() -> None:
    path = DATA / "llava_1_5_hf" / "checkpoint" / "preprocessor_config.json"
    config = json.loads(path.read_text())
    assert config["size"]["shortest_edge"] == CENTER_CROP.shortest_edge
    assert config["rescale_factor"] == FORMAT.rescale_factor
    assert tuple(config["image_mean"]) == FORMAT.mean


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    mode=st.sampled_from(["RGB", "L", "P", "1", "CMYK", "YCbCr"]),
    edge=st.integers(1, 60),
    crop=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    resample=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]),
    seed=st.integers(0, 2**32 - 1),
)
@example(size=(1, 1), mode="RGB", edge=24, crop=(24, 24), resample="bicubic", seed=0)
@example(size=(90, 31), mode="RGB", edge=24, crop=(33, 20), resample="bicubic", seed=0)
@settings(max_examples=examples(120))
def test_center_crop_is_the_original(
    size: tuple[int, int],
    mode: str,
    edge: int,
    crop: tuple[int, int],
    resample: str,
    seed: int,
) -> None:
    policy = CenterCrop(filtered(resample), edge, crop)
    image = noise(*size, seed).convert(mode)
    assert_same_bits(preprocess(image, policy), original(image, policy))


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    mode=st.sampled_from(["RGB", "L", "P", "1", "CMYK"]),
    crop=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 2**32 - 1),
)
@example(size=(1, 1), mode="RGB", crop=(24, 24), seed=0)
@example(size=(90, 1), mode="L", crop=(33, 20), seed=0)
@settings(max_examples=60)
def test_stretch_resizes_the_whole_image(
    size: tuple[int, int], mode: str, crop: tuple[int, int], seed: int
) -> None:
    policy = Stretch(FORMAT, crop)
    image = noise(*size, seed).convert(mode)
    resized = image.convert("RGB").resize(crop[::-1], Image.Resampling.BICUBIC)
    levels = np.asarray(resized).astype(np.float64) / 255
    expected = ((levels - FORMAT.mean) / FORMAT.std).transpose(2, 0, 1)
    np.testing.assert_allclose(preprocess(image, policy)[0], expected, atol=1e-6, rtol=1e-6)


@given(
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    mode=st.sampled_from(["RGB", "L", "P", "1", "CMYK"]),
    edge=st.integers(1, 60),
    crop=st.integers(1, 70),
    resample=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    seed=st.integers(0, 2**32 - 1),
)
@example(size=(1, 1), mode="RGB", edge=24, crop=24, resample="bicubic", seed=0)
@settings(max_examples=examples(120))
def test_pad_square_is_the_original(
    size: tuple[int, int], mode: str, edge: int, crop: int, resample: str, seed: int
) -> None:
    policy = PadSquare(filtered(resample), edge, (crop, crop), MEAN_COLOUR)
    image = noise(*size, seed).convert(mode)
    expected = original(padded(image, MEAN_COLOUR), policy)
    assert_same_bits(preprocess(image, policy), expected)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3000, 1999), (1999, 3000)])
def test_pad_square_in_bands_is_the_original(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = original(padded(image, MEAN_COLOUR), PAD_SQUARE)
    assert_same_bits(preprocess(image, PAD_SQUARE), expected)


@pytest.mark.parametrize("portrait", [True, False])
def test_center_crop_of_an_extreme_shape(portrait: bool) -> None:
    """Across, a 1-pixel-wide image is constant, so the long side alone gives the reference."""
    line = noise(1, 5000)
    edge = CENTER_CROP.shortest_edge
    long = line.resize((1, edge * 5000), Image.Resampling.BICUBIC)
    top = (edge * 5000 - edge) // 2
    image = long.crop((0, top, 1, top + edge)).resize((edge, edge))
    expected = preprocess(image, CENTER_CROP)
    if not portrait:
        line = line.transpose(Image.Transpose.TRANSPOSE)
        expected = expected.swapaxes(2, 3)
    ours = preprocess(line, CENTER_CROP)
    assert ours.shape == (1, 3, edge, edge)
    one_level = 1 / 255 / min(FORMAT.std)
    assert np.abs(ours - expected).max() <= 1.01 * one_level
    assert np.mean(ours != expected) < 0.01


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(40, 900), (900, 40), (333, 211), (7, 400)])
def test_the_window_of_a_large_resize_is_that_of_the_whole(
    resample: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = noise(9, 9).resize(size, Image.Resampling.BICUBIC)
    policy = CenterCrop(filtered(resample), CENTER_CROP.shortest_edge, (200, 150))
    whole = preprocess(smooth, policy)
    monkeypatch.setattr("vlmforge.engine.images.center_crop.MAX_RESIZED_PIXELS", 0)
    window = preprocess(smooth, policy)
    assert np.abs(window - whole).max() <= 1.01 / 255 / min(FORMAT.std)
    assert np.mean(window != whole) < 0.01


def test_an_image_too_long_for_a_square_names_its_aspect_ratio() -> None:
    with pytest.raises(ImageError, match="aspect ratio 40000:1"):
        preprocess(Image.new("RGB", (1, 40_000)), PAD_SQUARE)


@pytest.mark.parametrize("background", [(10, 200, 30), None])
def test_alpha_shows_the_policys_background(background: tuple[int, int, int] | None) -> None:
    clear = Image.new("RGBA", (20, 20), (9, 9, 9, 0))
    plain = Image.new("RGB", (20, 20), background or (9, 9, 9))
    for known in POLICIES:
        pixels = structs.replace(FORMAT, background=background)
        policy = structs.replace(known, format=pixels)
        np.testing.assert_array_equal(preprocess(clear, policy), preprocess(plain, policy))


def anyres_of_transformers(image: Image.Image, policy: AnyRes) -> np.ndarray:
    """Views as transformers makes them, with its pinpoints height first."""
    side = policy.tiling.tile
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[list(canvas[::-1]) for canvas in policy.tiling.canvases],
        resample=Image.Resampling.BICUBIC,
        image_mean=policy.format.mean,
        image_std=policy.format.std,
    )
    return np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]


def anyres_of_the_original(image: Image.Image, policy: AnyRes) -> np.ndarray:
    views = anyres_original.views(image, policy.tiling.canvases, policy.tiling.tile)
    return np.concatenate([original(view, TILE) for view in views])


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK"]),
    seed=st.integers(0, 99),
)
@example(size=(1, 1), mode="RGB", seed=0)
@example(size=(1, 4000), mode="RGB", seed=0)
@example(size=(4000, 1), mode="RGB", seed=0)
@example(size=(56, 28), mode="RGB", seed=0)
@example(size=(57, 27), mode="LA", seed=0)
@settings(max_examples=examples(150))
def test_anyres_is_the_original(size: tuple[int, int], mode: str, seed: int) -> None:
    image = noise(*size, seed).convert("RGBA" if mode == "RGBA" else "RGB").convert(mode)
    policy = structs.replace(ANYRES, format=structs.replace(FORMAT, background=None))
    ours = preprocess(image, policy)
    assert_same_bits(ours, anyres_of_the_original(image, policy))
    assert len(ours) == view_count(size, policy.tiling)


@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_anyres_is_that_of_transformers(size: tuple[int, int], seed: int) -> None:
    image = noise(*size, seed)
    np.testing.assert_allclose(
        preprocess(image, ANYRES), anyres_of_transformers(image, ANYRES), atol=1e-6, rtol=0
    )


@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), st.sampled_from(POLICIES))
def test_what_a_policy_answers_goes_together(size: tuple[int, int], policy: ImagePolicy) -> None:
    """As many rows as the vision part gives the views, and never more than the most."""
    views, rows = preprocess(Image.new("RGB", size), policy), policy.rows(size)
    assert views.dtype == np.float32
    assert policy.sized == (rows is not None)
    assert str(policy).startswith(policy.name)
    if rows is None:
        assert (len(views), policy.most_tokens(5)) == (1, 5)
    else:
        assert rows.max() < len(views) * 5
        assert len(rows) <= policy.most_tokens(5)
