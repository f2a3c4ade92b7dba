"""Decoding: every mode and orientation against plain references, and every way to be refused."""

from __future__ import annotations

import base64
import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from image_files import encoded, png_header
from vlmforge.errors import ImageError
from vlmforge.vl import encode_image_base64
from vlmforge.vl.decode import decode_image, to_rgb
from vlmforge.vl.image_limits import FORMATS, ImageLimits

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (23, 37, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)
ORIENTATION = 0x0112
ALL_FORMATS = ImageLimits(formats=FORMATS)

# What a viewer must do to stored pixels, in numpy, from the EXIF specification's row/column table.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def composite(rgb: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    weight = alpha[..., None] / 255
    return rgb * weight + np.array(background) * (1 - weight)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_and_dropped(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    smooth = PHOTO.resize((48, 32))
    stored = encoded(smooth, image_format, exif=exif)
    image = decode_image(stored, name="photo", limits=ALL_FORMATS)

    plain = np.asarray(Image.open(io.BytesIO(encoded(smooth, image_format))))
    np.testing.assert_array_equal(np.asarray(image), UPRIGHT[orientation](plain))
    assert ORIENTATION not in image.getexif()
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(image))


def test_to_rgb_and_base64_apply_an_orientation_that_is_still_there() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    opened = Image.open(io.BytesIO(encoded(PHOTO, exif=exif)))
    expected = UPRIGHT[6](PIXELS)
    np.testing.assert_array_equal(np.asarray(to_rgb(opened)), expected)
    sent = Image.open(io.BytesIO(base64.b64decode(encode_image_base64(opened))))
    np.testing.assert_array_equal(np.asarray(sent), expected)
    assert ORIENTATION not in sent.getexif()


def test_damaged_exif_leaves_the_pixels() -> None:
    data = encoded(PHOTO, exif=b"Exif\x00\x00 this is no TIFF header at all")
    np.testing.assert_array_equal(np.asarray(decode_image(data, name="photo")), PIXELS)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("accept_truncated", [False, True])
def test_every_format_decodes_whole_and_no_other(
    image_format: str, accept_truncated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", accept_truncated)
    noise = Image.fromarray(RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    data = encoded(noise, image_format)
    image = decode_image(data, name="photo", limits=ALL_FORMATS)
    assert image.size == (120, 90)
    reference = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(reference))
    for kept in (0.95, 0.5, 0.1, 0.01):
        with pytest.raises(ImageError) as caught:
            decode_image(data[: int(len(data) * kept)], name="photo.bin", limits=ALL_FORMATS)
        assert "photo.bin" in str(caught.value)
        assert caught.value.found
        assert caught.value.fix
    assert accept_truncated == ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"please describe this picture", "b'please describe '"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "send the image as PNG or JPEG"),
        (encoded(PHOTO, "JPEG")[:-300], "truncated"),
        (encoded(PHOTO)[:-300], "truncated"),
        (encoded(PHOTO).replace(b"IHDR", b"IHXX"), "damaged PNG header"),
    ],
)
def test_bytes_that_are_not_a_whole_image_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data, name="holiday.png")
    assert words in str(caught.value)
    assert "holiday.png" in caught.value.summary
    assert caught.value.found and caught.value.expected and caught.value.fix


def test_eps_is_not_given_to_an_external_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", run)
    with pytest.raises(ImageError, match="not an image"):
        decode_image(encoded(PHOTO, "EPS"), name="drawing.eps")


@pytest.mark.parametrize("size", [(50_000, 50_000), (9_800, 9_700), (20_000, 9_500)])
def test_a_huge_image_is_refused_from_its_header(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("pixels were decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} ="):
            decode_image(png_header(*size), name="bomb", limits=ImageLimits(max_pixels=95_000_000))
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_size_between_pillows_warning_and_our_limit_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encoded(PHOTO), name="photo").size == PHOTO.size


def test_limits_are_inclusive() -> None:
    data = encoded(PHOTO)
    exact = ImageLimits(max_pixels=23 * 37, max_bytes=len(data))
    assert decode_image(data, name="photo", limits=exact).size == (37, 23)
    with pytest.raises(ImageError, match="too many pixels"):
        decode_image(data, name="photo", limits=ImageLimits(max_pixels=23 * 37 - 1))
    with pytest.raises(ImageError, match=f"at most {len(data) - 1} bytes"):
        decode_image(data, name="photo", limits=ImageLimits(max_bytes=len(data) - 1))


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    for image_format in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0], image_format, save_all=True, append_images=frames[1:], lossless=True
        )
        image = to_rgb(decode_image(data, name="animation"))
        assert image.getcolors() == [(63, (255, 0, 0))]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["RGBA", "LA", "PA"]),
    st.tuples(*[st.integers(0, 255)] * 3),
)
@settings(max_examples=40, deadline=None)
def test_alpha_is_composited(seed: int, mode: str, background: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (5, 6, 4), dtype=np.uint8))
    if mode != "RGBA":
        image = image.convert("LA").convert(mode)
    rgba = np.asarray(image.convert("RGBA"))
    expected = composite(rgba[..., :3], rgba[..., 3], background)
    assert np.abs(np.asarray(to_rgb(image, background)) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_opaque_alpha_is_the_identity(mode: str) -> None:
    opaque = Image.fromarray(np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]))
    image = opaque if mode == "RGBA" else opaque.convert("LA").convert(mode)
    expected = PIXELS if mode == "RGBA" else np.asarray(opaque.convert("L").convert("RGB"))
    np.testing.assert_array_equal(np.asarray(to_rgb(image, (1, 2, 3))), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_without_a_background_transparent_pixels_keep_their_colour(mode: str) -> None:
    alpha = (np.arange(PIXELS.size // 3, dtype=np.uint8).reshape(PIXELS.shape[:2]) % 3) * 127
    image = Image.fromarray(np.dstack([PIXELS, alpha]))
    if mode != "RGBA":
        image = image.convert("RGBa") if mode == "RGBa" else image.convert("LA").convert(mode)
    straight = image.convert({"RGBa": "RGBA", "La": "LA"}.get(mode, mode))
    expected = np.asarray(straight.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(to_rgb(image, None)), expected)


def test_without_a_background_a_transparent_colour_is_a_colour() -> None:
    rgb = Image.fromarray(np.array([[[10, 20, 30], [200, 100, 50]]], np.uint8))
    image = decode_image(encoded(rgb, transparency=(10, 20, 30)), name="rgb")
    np.testing.assert_array_equal(np.asarray(to_rgb(image, None)), np.asarray(rgb))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    for transparency in (0, bytes([0, 255])):
        image = decode_image(encoded(palette, transparency=transparency), name="p")
        np.testing.assert_array_equal(np.asarray(to_rgb(image, None)), np.asarray(rgb))


def test_premultiplied_alpha() -> None:
    for mode, straight in (("La", "LA"), ("RGBa", "RGBA")):
        image = Image.new(straight, (2, 2), (100,) * (len(straight) - 1) + (128,)).convert(mode)
        ours = np.asarray(to_rgb(image, (200, 0, 50))).astype(int)
        assert np.abs(ours[0, 0] - [150, 50, 75]).max() <= 1


def test_a_transparent_colour_or_palette_entry_shows_the_background() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    expected = [[[1, 2, 3], [200, 100, 50]]]
    for transparency in (0, bytes([0, 255])):
        image = decode_image(encoded(palette, transparency=transparency), name="p")
        assert image.mode == "P"
        assert np.asarray(to_rgb(image, (1, 2, 3))).tolist() == expected

    rgb = Image.fromarray(np.array([[[10, 20, 30], [200, 100, 50]]], np.uint8))
    image = decode_image(encoded(rgb, transparency=(10, 20, 30)), name="rgb")
    assert np.asarray(to_rgb(image, (1, 2, 3))).tolist() == expected

    grey = Image.fromarray(np.array([[10, 200]], np.uint8))
    image = decode_image(encoded(grey, transparency=10), name="l")
    assert np.asarray(to_rgb(image, (1, 2, 3))).tolist() == [[[1, 2, 3], [200] * 3]]


def test_every_16_bit_grey_level_is_scaled() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.array([(2 * v + 257) // 514 for v in range(65536)]).reshape(256, 256)
    deep = Image.fromarray(levels)
    sources = [
        decode_image(encoded(deep), name="png"),
        decode_image(encoded(deep, "TIFF"), name="tiff", limits=ALL_FORMATS),
        Image.fromarray(levels.astype(np.int32)),
        Image.fromarray(levels.astype(np.float32)),
        Image.frombytes("I;16B", (256, 256), levels.astype(">u2").tobytes()),
    ]
    for image in sources:
        assert image.mode in ("I;16", "I;16B", "I", "F")
        rgb = np.asarray(to_rgb(image))
        assert all(np.array_equal(rgb[..., channel], expected) for channel in range(3))


def test_a_transparent_16_bit_grey_shows_the_background() -> None:
    deep = Image.fromarray(np.array([[256, 65535]], np.uint16))
    deep.info["transparency"] = 256
    assert np.asarray(to_rgb(deep, (9, 8, 7))).tolist() == [[[9, 8, 7], [255] * 3]]


def test_float_fractions_are_scaled_and_other_ranges_refused() -> None:
    fractions = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert np.asarray(to_rgb(fractions))[0, :, 0].tolist() == [0, 128, 255]
    for bad in (-1.0, 70_000.0, float("nan")):
        with pytest.raises(ImageError, match="out of range"):
            to_rgb(Image.fromarray(np.array([[0.0, bad]], np.float32)))
    with pytest.raises(ImageError, match="found:    0 to 65536"):
        to_rgb(Image.fromarray(np.array([[0, 65536]], np.int32)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_plain_modes_convert_as_pillow_does(mode: str) -> None:
    image = PHOTO.convert(mode)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg() -> None:
    red = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), name="print")
    assert red.mode == "CMYK"
    assert np.abs(np.asarray(to_rgb(red)).astype(int) - [255, 0, 0]).max() <= 3


def test_lab_is_converted() -> None:
    white = Image.merge("LAB", [Image.new("L", (2, 2), v) for v in (255, 128, 128)])
    assert np.asarray(to_rgb(white)).min() >= 250


def test_a_one_bit_png() -> None:
    bits = Image.fromarray(PIXELS[..., 0] > 127)
    image = decode_image(encoded(bits), name="fax")
    assert image.mode == "1"
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 1], (PIXELS[..., 0] > 127) * 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "F", "HSV"])
def test_base64_is_a_lossless_png(mode: str) -> None:
    image = Image.new("I;16", (3, 2), 777) if mode == "I;16" else PHOTO.convert(mode)
    sent = Image.open(io.BytesIO(base64.b64decode(encode_image_base64(image))))
    assert sent.format == "PNG"
    np.testing.assert_array_equal(np.asarray(to_rgb(sent)), np.asarray(to_rgb(image)))
