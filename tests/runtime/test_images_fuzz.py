"""Random and mutated bytes of every format: an image or an ImageError, and never much work.

What bounds the work is not a clock: files here are small, and limits on pixels and passes are set
low, so that no example can ask for more than a few million pixels.
"""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import examples
from image_files import encoded, jpeg_segment, png_chunk, run_length_bmp, with_more_scans
from vlmforge.errors import ImageError
from vlmforge.vl.containers import CONTAINERS, Container, DamagedError
from vlmforge.vl.decode import to_rgb
from vlmforge.vl.image_limits import FORMATS, ImageLimits
from vlmforge.vl.load import open_image

LIMITS = ImageLimits(max_pixels=1 << 18, max_work=1 << 22, formats=FORMATS)
RNG = np.random.default_rng(31)
PHOTO = Image.fromarray(RNG.integers(0, 256, (14, 19, 3), dtype=np.uint8))
EXIF = Image.Exif()
EXIF[0x0112] = 6


def seeds() -> dict[str, list[bytes]]:
    """Small files of each format, in their many ways to be one."""
    grey, palette = PHOTO.convert("L"), PHOTO.convert("P")
    clear = PHOTO.copy()
    clear.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [PHOTO.rotate(180)]}
    return {
        "PNG": [
            encoded(PHOTO, exif=EXIF),
            encoded(palette, transparency=bytes(range(256))),
            encoded(clear),
            encoded(deep, transparency=257),
            encoded(PHOTO.convert("1")),
            encoded(PHOTO, **frames),
            encoded(grey)[:-12] + png_chunk(b"zTXt", b"Raw profile type exif\0\0x"),
        ],
        "JPEG": [
            encoded(PHOTO, "JPEG", exif=EXIF),
            encoded(grey, "JPEG", progressive=True, restart_marker_blocks=1),
            encoded(PHOTO.convert("CMYK"), "JPEG", progressive=True),
            with_more_scans(encoded(PHOTO, "JPEG", progressive=True), 3),
            encoded(PHOTO, "JPEG") + jpeg_segment(0xE2, b"MPF\0"),
        ],
        "WEBP": [
            encoded(PHOTO, "WEBP", exif=EXIF),
            encoded(clear, "WEBP", lossless=True),
            encoded(PHOTO, "WEBP", **frames),
        ],
        "GIF": [
            encoded(palette, "GIF", transparency=3, comment=b"a comment"),
            encoded(grey, "GIF", interlace=1),
            encoded(PHOTO, "GIF", **frames),
        ],
        "BMP": [encoded(image, "BMP") for image in (PHOTO, palette, clear, grey)]
        + [encoded(PHOTO.convert("1"), "BMP"), run_length_bmp(20, 9)],
        "TIFF": [
            encoded(PHOTO, "TIFF"),
            encoded(deep, "TIFF", compression="tiff_lzw"),
            encoded(clear, "TIFF", compression="tiff_deflate"),
        ],
        "AVIF": [encoded(PHOTO, "AVIF")],
        "PPM": [encoded(PHOTO, "PPM"), encoded(deep, "PPM"), b"P2 3 2 9 1 2 3 4 5 9"],
        "QOI": [encoded(PHOTO, "QOI"), encoded(clear, "QOI")],
    }


SEEDS = seeds()
LENGTHS = [0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@st.composite
def mutated(draw: st.DrawFn, image_format: str) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS[image_format])))
    for _ in range(draw(st.integers(1, 4))):
        # Headers are where the decisions are made.
        at = draw(st.integers(0, max(0, len(data) - 1)) | st.integers(0, 60))
        match draw(st.sampled_from(["set", "number", "cut", "drop", "repeat", "insert", "swap"])):
            case "set":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "number":
                size = draw(st.sampled_from([2, 4]))
                value = draw(st.sampled_from(LENGTHS)) & ((1 << 8 * size) - 1)
                order = draw(st.sampled_from(["big", "little"]))
                data[at : at + size] = value.to_bytes(size, order)
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 40))]
            case "repeat":
                piece = data[at : at + draw(st.integers(1, 60))]
                data[at:at] = piece * draw(st.integers(1, 20))
            case "insert":
                data[at:at] = draw(st.binary(max_size=30))
            case "swap":
                other = draw(st.sampled_from(SEEDS[image_format]))
                data[at:] = other[at:]
    return bytes(data)


def check(data: bytes) -> None:
    """An upright image of the size that was told, or one kind of error at either step."""
    try:
        opened = open_image(data, limits=LIMITS)
        assert 0 < opened.size[0] * opened.size[1] <= LIMITS.max_pixels
        image = opened.decode()
        assert image.size == opened.size
        rgb = to_rgb(image)
    except ImageError as error:
        assert error.summary and error.found and error.expected and error.fix
    else:
        assert (rgb.mode, rgb.size) == ("RGB", image.size)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_files(image_format: str) -> None:
    @given(mutated(image_format))
    @settings(max_examples=examples(100))
    def run(data: bytes) -> None:
        check(data)

    run()


SIGNATURES = [
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF89a",
    b"RIFF\0\0\0\0WEBPVP8X",
    b"RIFF\0\0\0\0WEBPVP8 ",
    b"RIFF\0\0\0\0WEBPVP8L",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x1cftypavif",
    b"P1",
    b"P5",
    b"P7",
    b"qoif",
]


@given(st.sampled_from(SIGNATURES), st.binary(max_size=300))
@settings(max_examples=examples(150))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_bytes(signature: bytes, data: bytes) -> None:
    check(signature + data)


@given(st.sampled_from(sorted(CONTAINERS)), st.binary(max_size=300))
@settings(max_examples=examples(150))
def test_no_bytes_break_the_walk_through_a_file(image_format: str, data: bytes) -> None:
    signature = SEEDS[image_format][0][:12]
    for content in (data, signature + data):
        try:
            found = CONTAINERS[image_format](content)
        except DamagedError as error:
            assert str(error)
        else:
            assert isinstance(found, Container)
            assert found.passes >= 1
            assert len(found.data) <= len(content) + 100


ANY_TEXT = st.text(st.characters(), max_size=60) | st.text("[]%0:/@.\0\udcff ", max_size=12)
BASE64 = st.binary(max_size=40).map(lambda data: base64.b64encode(data).decode())


@given(ANY_TEXT | BASE64)
@settings(max_examples=examples(100))
def test_random_texts_are_no_images(text: str) -> None:
    for head in ("data:", "data:;base64,", "data:image/png;base64,", "file://", "iVBORw0KGgo"):
        for limits in (ImageLimits(local_files=False), ImageLimits(local_files="/proc/sys")):
            with pytest.raises(ImageError) as caught:
                open_image(head + text, limits=limits)
            assert caught.value.found and caught.value.fix


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_seeds_are_images(image_format: str) -> None:
    """What is mutated is whole, so that mutations get deep into the decoders."""
    for data in SEEDS[image_format]:
        if data == run_length_bmp(20, 9):
            continue
        expected = Image.open(io.BytesIO(data))
        expected.load()
        mode = open_image(data, limits=LIMITS).decode().mode
        assert mode == expected.mode or (mode, expected.mode) == ("I;16", "I")


def pixels_by_pillow(data: bytes) -> np.ndarray | None:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, IndexError, EOFError):
        return None
    return np.asarray(image)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_without_its_end_is_whole_where_it_is_to_pillow(image_format: str) -> None:
    for data in SEEDS[image_format]:
        if data == run_length_bmp(20, 9):
            continue
        for cut in range(len(data) - 24, len(data)):
            expected = pixels_by_pillow(data[:cut])
            try:
                image = open_image(data[:cut], limits=LIMITS).decode()
            except ImageError:
                assert expected is None
            else:
                if expected is None:  # cut in a chunk behind the pixels, which nothing needs
                    assert image_format == "PNG"
                    continue
                upright = image.size == expected.shape[1::-1]
                turned = expected if upright else np.rot90(expected, -1)
                np.testing.assert_array_equal(np.asarray(image), turned)
