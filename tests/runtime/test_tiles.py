"""Tiles of images of any size, against the image processors of transformers that cut them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
from transformers import GotOcr2ImageProcessorPil, Idefics3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.smolvlm import image_processing_pil_smolvlm as smol
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from vlmforge.engine.images.aspect_tiles import AspectTiles
from vlmforge.engine.images.grid_tiles import GridTexts, GridTiles
from vlmforge.engine.images.pixels import PixelFormat, Size

PRIMES = (2, 3, 5, 7, 23, 97, 331, 449, 499, 673, 1009, 1999, 3989)
BICUBIC = PixelFormat("bicubic", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LANCZOS = PixelFormat("lanczos", 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TEXTS = GridTexts("F<row_{row}_col_{column}>", "\n", "\nFG", "FG", "F")


def sizes(tile: int) -> list[Size]:
    """A thousand: the extremes, primes, around every threshold, and at random."""
    found: dict[Size, None] = dict.fromkeys([(1, 1), (1, 4000), (4000, 1), (tile, tile)])
    found.update(dict.fromkeys((a, b) for a in PRIMES for b in PRIMES))
    for across in range(1, 7):
        for down in range(1, 7):
            for by in (-1, 0, 1):
                found[across * tile + by, down * tile] = None
                found[across * tile, down * tile + by] = None
            # Around the area that decides between grids of one aspect ratio.
            edge = int((across * down / 2) ** 0.5 * tile)
            found.update(dict.fromkeys((edge + by, edge + by) for by in (-1, 0, 1)))
    draw = random.Random(tile)
    while len(found) < 1000:
        found[draw.randint(1, 4000), draw.randint(1, 4000)] = None
    return list(found)


@pytest.mark.parametrize("least_most", [(1, 12), (1, 6), (2, 4), (1, 1)], ids=str)
def test_grids_of_the_nearest_aspect_ratio(least_most: tuple[int, int]) -> None:
    least, most = least_most
    policy = AspectTiles(BICUBIC, 448, least, most, 256, "<", ">")
    processor = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, min_patches=least, max_patches=most
    )
    tokens = []
    for width, height in sizes(448):
        if most > 1:
            expected = get_optimal_tiled_canvas((height, width), (448, 448), least, most)
            assert policy.grid((width, height)) == expected, (width, height)
        views = processor.get_number_of_image_patches(height, width, {"crop_to_patches": True})
        rows = policy.rows((width, height))
        assert rows is not None
        assert rows.tolist() == list(range(views * 256))
        assert policy.layout((width, height), len(rows)) == ("<", len(rows), ">")
        tokens.append(len(rows))
    assert max(tokens) == policy.most_tokens(0)


class _Sizes(Idefics3ImageProcessorPil):  # type: ignore[misc]
    """The processor with resizing that makes no pixels."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.sizes: list[Size] = []

    def grid(self, size: Size, longest: int, tile: int) -> Size:
        width, height = size
        image = np.broadcast_to(np.zeros((), np.uint8), (3, height, width))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "transformers.image_processing_backends.np_resize",
                lambda image, size, **_: np.broadcast_to(image[:1, :1, :1], (3, *size)),
            )
            resized = self.resize(image, smol.SizeDict(longest_edge=longest))
            canvas = self.resize_for_vision_encoder(resized, tile)
            _, rows, columns = self.split_images(canvas, {"longest_edge": tile})
        return columns, rows


@pytest.mark.parametrize("published", [(512, 2048), (384, 1536), (364, 1820), (364, 5001)], ids=str)
def test_grids_of_a_longest_edge(published: tuple[int, int]) -> None:
    tile, longest = published
    policy, processor = GridTiles(LANCZOS, tile, longest, True, 4, TEXTS), _Sizes()
    tokens = []
    for size in sizes(tile):
        columns, rows = processor.grid(size, longest, tile)
        assert policy.grid(size) == (columns, rows), size
        layout = policy.layout(size, 0)
        text = "".join(piece if isinstance(piece, str) else "I" * piece for piece in layout)
        assert text == get_image_prompt_string(rows, columns, 4, "F", "I", "G")
        counted = sum(piece for piece in layout if isinstance(piece, int))
        indices = policy.rows(size)
        assert indices is not None
        assert indices.tolist() == list(range(counted))
        tokens.append(counted)
    assert max(tokens) == policy.most_tokens(0)


def test_one_view_where_nothing_is_split() -> None:
    policy = GridTiles(LANCZOS, 512, 2048, False, 64, TEXTS)
    for size in ((1, 1), (4000, 1), (2048, 2048)):
        assert policy.grid(size) == (0, 0)
        assert policy.layout(size, 64) == ("FG", 64, "F")
    assert policy.most_tokens(0) == 64


# --- pixels ---------------------------------------------------------------------------------------

SHOWN = ((1, 1), (1, 90), (57, 23), (28, 28), (61, 61), (97, 31), (200, 30))


def pictures() -> Iterator[PIL.Image.Image]:
    for width, height in SHOWN:
        values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
        yield PIL.Image.fromarray(values.astype(np.uint8))


def test_pixels_of_the_nearest_aspect_ratio() -> None:
    policy = AspectTiles(BICUBIC, 28, 1, 6, 4, "", "")
    processor = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28},
        max_patches=6,
        image_mean=BICUBIC.mean,
        image_std=BICUBIC.std,
    )
    for image in pictures():
        expected = processor(image, crop_to_patches=True, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(policy.pixels(image), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("splits", [True, False])
def test_pixels_of_a_longest_edge(splits: bool) -> None:
    policy = GridTiles(LANCZOS, 28, 84, splits, 4, TEXTS)
    options = {"size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 28}}
    for kind in (smol.SmolVLMImageProcessorPil, Idefics3ImageProcessorPil):
        processor = kind(do_image_splitting=splits, **options)
        for image in pictures():
            (expected,) = processor(image, return_tensors="np")["pixel_values"]
            np.testing.assert_allclose(policy.pixels(image), expected, atol=1e-5, rtol=0)
