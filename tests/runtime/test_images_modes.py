"""Every mode that Pillow has, against formulas that are written here and not taken from Pillow."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vlmforge.errors import ImageError
from vlmforge.vl.decode import decode_image, to_rgb

Bands = NDArray[np.uint8]

RNG = np.random.default_rng(11)
SHAPE = (9, 14)
WHITE_D50 = np.array([0.9642, 1.0, 0.8249])
# sRGB's primaries for the white D50, by Bradford's adaptation (ICC's sRGB profile).
SRGB_D50 = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)


def bands(count: int) -> Bands:
    return RNG.integers(0, 256, (*SHAPE, count), dtype=np.uint8)


def image_of(mode: str, levels: NDArray[np.generic]) -> Image.Image:
    return Image.frombytes(mode, (SHAPE[1], SHAPE[0]), levels.tobytes())


def grey(levels: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.repeat(levels.reshape(SHAPE)[..., None], 3, axis=2)


def unmultiplied(levels: Bands) -> NDArray[np.float64]:
    colour, alpha = levels[..., :-1].astype(float), levels[..., -1:]
    return np.minimum(255, 255 * colour / np.maximum(alpha, 1))


def cmyk(levels: Bands) -> NDArray[np.float64]:
    ink = levels / 255
    return 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])


def ycbcr(levels: Bands) -> NDArray[np.float64]:
    """JFIF 1.02, "Conversion to and from RGB"."""
    y, cb, cr = (levels[..., i].astype(float) for i in range(3))
    rgb = (
        y + 1.402 * (cr - 128),
        y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
        y + 1.772 * (cb - 128),
    )
    return np.clip(np.stack(rgb, axis=-1), 0, 255)


def hsv(levels: Bands) -> NDArray[np.float64]:
    flat = [colorsys.hsv_to_rgb(*pixel) for pixel in (levels / 255).reshape(-1, 3)]
    return 255 * np.array(flat).reshape(levels.shape)


def lab_of(rgb: Bands) -> Bands:
    """CIE L*a*b* of sRGB colours, as 8 bits: L* 0..100 on 0..255, a* and b* plus 128."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    ratio = linear @ SRGB_D50.T / WHITE_D50
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * 841 / 108 + 4 / 29)
    x, y, z = (f[..., i] for i in range(3))
    lab = np.stack([(116 * y - 16) * 2.55, 500 * (x - y) + 128, 200 * (y - z) + 128], axis=-1)
    return np.clip(np.rint(lab), 0, 255).astype(np.uint8)


PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
ONE, TWO, THREE, FOUR = (bands(count) for count in (1, 2, 3, 4))
BITS = ONE > 127
LA_, RGBA_ = (
    np.dstack([np.minimum(levels[..., :-1], levels[..., -1:]), levels[..., -1:]])
    for levels in (TWO, FOUR)
)  # colours times alpha are never above alpha
SHARES = RNG.random(SHAPE, dtype=np.float32)
DEEP = RNG.integers(0, 65536, SHAPE, dtype=np.uint16)
SIXTEEN = grey((2 * DEEP.astype(int) + 257) // 514)


def palette_image(levels: Bands, mode: str) -> Image.Image:
    image = image_of(mode, levels)
    image.putpalette(PALETTE.tobytes())
    return image


def lab_image() -> tuple[Image.Image, Bands]:
    rgb = RNG.integers(90, 200, (*SHAPE, 3), dtype=np.uint8)
    # Pillow keeps a* and b* as signed bytes.
    return image_of("LAB", lab_of(rgb) ^ np.array([0, 128, 128], np.uint8)), rgb


# Image, its colours, and by how much a level may be off: Pillow's fixed-point arithmetic.
MODES: dict[str, tuple[Image.Image, NDArray[np.generic], float]] = {
    "1": (Image.fromarray(BITS[..., 0]), grey(BITS * 255), 0),
    "L": (image_of("L", ONE), grey(ONE), 0),
    "P": (palette_image(ONE, "P"), PALETTE[ONE[..., 0]], 0),
    "PA": (palette_image(TWO, "PA"), PALETTE[TWO[..., 0]], 0),
    "LA": (image_of("LA", TWO), grey(TWO[..., 0]), 0),
    "La": (image_of("La", LA_), grey(unmultiplied(LA_)), 1),
    "RGB": (image_of("RGB", THREE), THREE, 0),
    "RGBX": (image_of("RGBX", FOUR), FOUR[..., :3], 0),
    "RGBA": (image_of("RGBA", FOUR), FOUR[..., :3], 0),
    "RGBa": (image_of("RGBa", RGBA_), unmultiplied(RGBA_), 1),
    "CMYK": (image_of("CMYK", FOUR), cmyk(FOUR), 1),
    "YCbCr": (image_of("YCbCr", THREE), ycbcr(THREE), 1.6),
    "HSV": (image_of("HSV", THREE), hsv(THREE), 2.1),
    "LAB": (*lab_image(), 4),
    "I;16": (image_of("I;16", DEEP.astype("<u2")), SIXTEEN, 0),
    "I;16L": (image_of("I;16L", DEEP.astype("<u2")), SIXTEEN, 0),
    "I;16B": (image_of("I;16B", DEEP.astype(">u2")), SIXTEEN, 0),
    "I;16N": (image_of("I;16N", DEEP), SIXTEEN, 0),
    "I": (image_of("I", DEEP.astype(np.int32)), SIXTEEN, 0),
    "F": (image_of("F", DEEP.astype(np.float32)), SIXTEEN, 0),
    "I, 8 bits": (image_of("I", ONE.astype(np.int32)), grey(ONE), 0),
    "F, 8 bits": (image_of("F", ONE.astype(np.float32)), grey(ONE), 0),
    "F, shares": (image_of("F", SHARES), grey(np.rint(SHARES * 255)), 0),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_has_its_colours(name: str) -> None:
    image, expected, most = MODES[name]
    rgb = to_rgb(image, None)
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb).astype(float) - expected).max() <= most


def test_no_mode_is_left_out() -> None:
    assert {name.partition(",")[0] for name in MODES} == set(Image.MODES)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("transparency", [10, (1, 2, 3), bytes(range(256))])
def test_a_transparent_colour_never_breaks_a_mode(name: str, transparency: object) -> None:
    """Pillow's images carry the key along through conversions to modes that it does not fit."""
    image = MODES[name][0].copy()
    image.info["transparency"] = transparency
    colours = np.asarray(to_rgb(MODES[name][0], None))
    np.testing.assert_array_equal(np.asarray(to_rgb(image, None)), colours)
    shown = np.asarray(to_rgb(image, (9, 9, 9)))
    if not MODES[name][0].has_transparency_data and name != "P":
        covered = (shown != colours).any(axis=2)
        assert (shown[covered] == 9).all()


@pytest.mark.parametrize("levels", [257, 300])
@pytest.mark.parametrize("mode", ["P", "PA"])
def test_more_transparencies_than_a_palette_has_colours(mode: str, levels: int) -> None:
    image = MODES[mode][0].copy()
    colours = np.asarray(to_rgb(image, None))
    image.info["transparency"] = bytes(levels)
    shown = np.asarray(to_rgb(image, (9, 9, 9)))
    np.testing.assert_array_equal(shown, np.asarray(to_rgb(MODES[mode][0], (9, 9, 9))))
    np.testing.assert_array_equal(np.asarray(to_rgb(image, None)), colours)


def test_what_pillow_cannot_convert_is_an_image_error() -> None:
    image = Image.new("P", (2, 2))
    image.palette = None
    with pytest.raises(ImageError, match="mode P cannot be converted"):
        to_rgb(image)


@given(st.integers(0, 255), st.sampled_from(["I", "F"]))
def test_eight_bit_levels_are_as_pillow_converts_them(seed: int, mode: str) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, rng.integers(3, 257), SHAPE, dtype=np.uint8)
    assume(levels.max() >= 2)  # at most 1, levels of mode F are shares
    image = Image.fromarray(levels).convert(mode)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "highest", "white"),
    [
        ("I", 1, 255),
        ("I", 255, 255),
        ("I", 512, 65535),
        ("I", 65535, 65535),
        ("F", 0.9, 1),
        ("F", 1, 1),
        ("F", 2, 255),
        ("F", 254.5, 255),
        ("F", 512, 65535),
    ],
)
def test_the_data_tell_the_scale(mode: str, highest: float, white: int) -> None:
    levels = np.array([[0, highest]], np.int32 if mode == "I" else np.float32)
    rgb = np.asarray(to_rgb(Image.fromarray(levels)))
    assert rgb[0, :, 0].tolist() == [0, round(highest * 255 / white)]


@pytest.mark.parametrize(
    ("mode", "highest"), [("I", 256), ("I", 509), ("F", 1.01), ("F", 1.9), ("F", 255.5)]
)
def test_an_overshoot_is_not_taken_for_another_scale(mode: str, highest: float) -> None:
    """Resampling in mode I or F overshoots white; on the next scale the image would be black."""
    levels = np.array([[0, highest]], np.int32 if mode == "I" else np.float32)
    with pytest.raises(ImageError, match="of no known scale") as caught:
        to_rgb(Image.fromarray(levels))
    assert caught.value.found.startswith("0")
    assert "mode I;16" in caught.value.fix


def test_a_dark_deep_image_stays_dark() -> None:
    """16 bits that no level above 255 gives away: the file's format tells, or the mode."""
    dark = np.array([[0, 128, 255]], np.uint16)
    files = {}
    for image_format in ("PNG", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(dark).save(buffer, image_format)
        files[image_format] = buffer.getvalue()
    pgm = Image.open(io.BytesIO(files["PPM"]))
    assert pgm.mode == "I"
    for image in (Image.fromarray(dark), decode_image(files["PNG"], name="png"), pgm):
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 1]


def test_a_deep_image_of_an_old_png_reader_is_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow before 11 reads 16-bit PNGs into mode I."""
    from PIL import PngImagePlugin

    modes = PngImagePlugin._MODES | {(16, 0): ("I", "I;16B")}
    monkeypatch.setattr(PngImagePlugin, "_MODES", modes)
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 128, 255]], np.uint16)).save(buffer, "PNG")
    for image in (Image.open(buffer), decode_image(buffer.getvalue(), name="png")):
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 1]
