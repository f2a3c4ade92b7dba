"""Images whose decoding costs more than their size tells are refused, and the others unharmed."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from image_files import (
    encoded,
    jpeg_segment,
    png_chunk,
    run_length_bmp,
    scans_of,
    with_more_scans,
)
from vlmforge.errors import CancelledError, ImageError
from vlmforge.vl import containers
from vlmforge.vl.decode import decode_image
from vlmforge.vl.encoded import open_encoded
from vlmforge.vl.image_limits import DEFAULT_FORMATS, FORMATS, ImageLimits

PIXELS = np.random.default_rng(5).integers(0, 256, (40, 56, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)
SMOOTH = PHOTO.resize((8, 6)).resize((56, 40))
PASS = 1 << 16  # what a pass over a small image counts as


def refusal(data: bytes, **limits: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, name="photo", limits=ImageLimits(**limits))
    assert caught.value.found and caught.value.expected and caught.value.fix
    return caught.value


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("pixels were decoded"))


# --- scans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("more", [0, 1, 90])
def test_the_scans_of_a_jpeg_are_counted(mode: str, more: int) -> None:
    stored = encoded(SMOOTH.convert(mode), "JPEG", progressive=True)
    data = with_more_scans(stored, more)
    scans = len(scans_of(stored)) + more
    assert scans > 3
    work = scans * PASS
    image = decode_image(data, name="photo", limits=ImageLimits(max_work=work))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))
    error = refusal(data, max_work=work - 1)
    assert error.summary == "photo is too much work to decode."
    assert error.found == f"{scans} scans of 56 x 40 pixels"
    assert "not progressive" in error.fix


def test_a_jpeg_of_many_scans_is_refused_by_default(undecoded: None) -> None:
    """A third of a megabyte that takes a minute; its pixels are never begun."""
    size = struct.pack(">HH", 9000, 9000)
    stored = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True)
    assert stored.count(struct.pack(">HH", 64, 64)) == 1
    data = with_more_scans(stored.replace(struct.pack(">HH", 64, 64), size), 100)
    assert "scans of 9000 x 9000 pixels" in refusal(data).found
    opened = open_encoded(data, name="photo", limits=ImageLimits(max_work=10**11))
    assert opened.size == (9000, 9000)


def test_one_scan_is_never_too_much() -> None:
    data = encoded(PHOTO, "JPEG")
    assert decode_image(data, name="photo", limits=ImageLimits(max_work=1)).size == PHOTO.size


NOISE = [
    jpeg_segment(0xFE, b"a comment with \xff\xda in it"),
    jpeg_segment(0xEC, b"\xff\xda\xff\xd9"),
    jpeg_segment(0xE2, b"ICC_PROFILE\0\1\2half of one"),
    b"\xff\xff\xff",
]


@given(st.lists(st.sampled_from(NOISE), max_size=4), st.lists(st.sampled_from(NOISE), max_size=4))
@settings(max_examples=30)
def test_what_stands_between_scans_is_no_scan(front: list[bytes], between: list[bytes]) -> None:
    stored = encoded(SMOOTH, "JPEG", progressive=True)
    first, *_, last = scans_of(stored)
    data = (
        stored[:2]
        + b"".join(front)
        + stored[2:first]
        + stored[first:last]
        + b"".join(between)
        + stored[last:]
        + b"\xff\xda behind the end"
    )
    assert containers.jpeg(data).passes == len(scans_of(stored))
    image = decode_image(data, name="photo")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(stored))))


def test_restart_markers_are_no_scans() -> None:
    data = encoded(PHOTO, "JPEG", restart_marker_blocks=2)
    assert {b"\xff\xd0", b"\xff\xd1", b"\xff\xd2"} <= {data[i : i + 2] for i in range(len(data))}
    assert containers.jpeg(data).passes == 1
    reference = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(np.asarray(decode_image(data, name="p")), np.asarray(reference))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"keep_rgb": True}, {"subsampling": 2}])
def test_the_colours_of_a_jpeg_are_kept(mode: str, options: dict[str, object]) -> None:
    """JFIF's and Adobe's segments decide them, and only those two are kept."""
    data = encoded(SMOOTH.convert(mode), "JPEG", **(options if mode == "RGB" else {}))
    reference = Image.open(io.BytesIO(data))
    image = decode_image(data, name="photo")
    assert image.mode == reference.mode
    np.testing.assert_array_equal(np.asarray(image), np.asarray(reference))


def with_components(jpeg: bytes, names: bytes) -> bytes:
    """A JPEG of three components under other names, in its frame and its scan."""
    data = bytearray(jpeg)
    frame, scan = jpeg.index(b"\xff\xc0"), scans_of(jpeg)[0]
    for i, name in enumerate(names):
        data[frame + 10 + 3 * i] = data[scan + 5 + 2 * i] = name
    return bytes(data)


def test_jfif_and_adobe_decide_what_components_are() -> None:
    """JFIF says YCbCr whatever their names are, Adobe's transform 0 says RGB."""
    usual, kept = (encoded(SMOOTH, "JPEG", keep_rgb=kept, quality=95) for kept in (False, True))
    adobe = jpeg_segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")
    assert b"JFIF" in usual and b"JFIF" not in kept
    for data, reference in (
        (with_components(usual, b"RGB"), usual),
        (with_components(kept[:2] + adobe + kept[2:], b"\1\2\3"), kept),
    ):
        expected = np.asarray(Image.open(io.BytesIO(reference)))
        np.testing.assert_array_equal(np.asarray(decode_image(data, name="photo")), expected)


def test_fill_bytes_without_end_are_refused() -> None:
    data = encoded(PHOTO, "JPEG")
    assert decode_image(data[:-2] + b"\xff" * 4000 + b"\xff\xd9", name="photo").size == PHOTO.size
    assert "fill bytes" in refusal(data[:-2] + b"\xff" * 5000 + b"\xff\xd9").found


# --- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", FORMATS)
def test_formats_are_allowed_by_name(image_format: str) -> None:
    data = encoded(PHOTO, image_format)
    limits = ImageLimits(formats=(image_format,))
    assert decode_image(data, name="photo", limits=limits).size == PHOTO.size
    others = tuple(other for other in FORMATS if other != image_format)
    error = refusal(data, formats=others)
    assert error.found == f"a {image_format} file"
    assert error.expected == "one of " + ", ".join(others)
    assert f"VisionConfig(image_formats=(..., {image_format!r}))" in error.fix


def test_formats_with_slow_decoders_are_off_by_default() -> None:
    assert ImageLimits().formats == DEFAULT_FORMATS
    for image_format in ("TIFF", "AVIF", "PPM", "QOI"):
        assert refusal(encoded(PHOTO, image_format)).found == f"a {image_format} file"


def test_a_run_length_bmp_is_refused(undecoded: None) -> None:
    data = run_length_bmp(200, 3)
    assert Image.open(io.BytesIO(data)).size == (200, 3)
    error = refusal(data)
    assert error.summary == "photo is compressed in a way that is slow to decode."
    assert "not compressed" in error.expected


# --- what readers would read on the way ----------------------------------------------------------


def test_texts_and_profiles_of_a_png_are_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", lambda _: pytest.fail("inflated"))
    bomb = zlib.compress(bytes(1 << 20))
    chunks = (
        png_chunk(b"zTXt", b"Comment\0\0" + bomb),
        png_chunk(b"iCCP", b"profile\0\0" + bomb),
        png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb),
    )
    data = encoded(PHOTO)
    data = data[:33] + b"".join(chunks) * 20 + data[33:]
    np.testing.assert_array_equal(np.asarray(decode_image(data, name="photo")), PIXELS)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF"])
def test_decoders_get_nothing_that_is_no_pixel(image_format: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "SECOND"
    options = {"comment": b"FIRST", "exif": exif, "icc_profile": b"THIRD" * 20}
    data = encoded(PHOTO, image_format, **options)
    assert b"FIRST" in data or b"SECOND" in data
    kept = containers.CONTAINERS[image_format](data).data
    assert not any(word in kept for word in (b"FIRST", b"SECOND", b"THIRD", b"iCCP"))
    expected = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(np.asarray(decode_image(data, name="p")), np.asarray(expected))


def comment(blocks: int) -> bytes:
    return b"!\xfe" + (b"\x03abc") * blocks + b"\0"


@pytest.mark.parametrize(
    ("image_format", "place", "part"),
    [
        ("PNG", 33, png_chunk(b"abCd", b"x")),
        ("JPEG", 2, jpeg_segment(0xE1, b"Exif\0\0x")),
        ("GIF", 13 + 768, comment(1)),
        ("GIF", 13 + 768, comment(1)[:-1]),
        ("WEBP", None, b"ABCD\0\0\0\0"),
    ],
)
def test_parts_without_end_are_refused(
    image_format: str, place: int | None, part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "MAX_PARTS", 60)
    data = encoded(PHOTO.convert("L") if image_format == "GIF" else PHOTO, image_format)
    if part == comment(1)[:-1]:  # one comment of many blocks
        part, more = comment(80), 1
    else:
        more = 80
    place = len(data) if place is None else place
    error = refusal(data[:place] + part * more + data[place:])
    assert "more than 60 parts" in error.found
    image = decode_image(data, name="photo")
    assert image.size == PHOTO.size
    few = data[:place] + (comment(1) if image_format == "GIF" else part) * 3 + data[place:]
    np.testing.assert_array_equal(np.asarray(decode_image(few, name="photo")), np.asarray(image))


def test_a_scan_of_parts_is_bounded_in_a_jpeg_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_PARTS", 60)
    data = encoded(PHOTO, "JPEG")
    assert "more than 60 parts" in refusal(data[:-2] + jpeg_segment(0xFE, b"x") * 80).found


def test_a_webp_canvas_is_checked_before_its_reader_takes_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        Image.OPEN, "WEBP", (lambda *_: pytest.fail("opened"), Image.OPEN["WEBP"][1])
    )
    sides = struct.pack("<I", 9999)[:3] + struct.pack("<I", 19999)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides
    error = refusal(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert error.found == "10000 x 20000 = 200000000 pixels"
    for kind, image in (("VP8 ", PHOTO), ("VP8L", PHOTO)):
        data = encoded(image, "WEBP", lossless=kind == "VP8L")
        assert data[12:16] == kind.encode()
        assert "56 x 40 = 2240 pixels" in refusal(data, max_pixels=2239).found


def gif_with_frame(left: int, top: int) -> bytes:
    data = encoded(PHOTO.convert("L"), "GIF")
    start = data.index(b",", 13 + 768)
    return data[: start + 1] + struct.pack("<HH", left, top) + data[start + 5 :]


def test_a_gif_is_as_large_as_its_first_frame_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    data = gif_with_frame(10, 20)
    reference = Image.open(io.BytesIO(data))
    image = decode_image(data, name="photo")
    assert image.size == reference.size == (66, 60)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(reference))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        assert decode_image(data, name="photo").size == (66, 60)
        assert "65056 x 65040" in refusal(gif_with_frame(65000, 65000)).found
        assert "outside of its screen" in refusal(gif_with_frame(65500, 0)).found


# --- cancelling and time -------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", [f for f in DEFAULT_FORMATS if f != "WEBP"])
def test_a_decoder_asks_between_pieces(image_format: str) -> None:
    """Whether it is still wanted; a WebP is decoded in one piece."""
    noise = np.random.default_rng(1).integers(0, 256, (200, 300), dtype=np.uint8)
    opened = open_encoded(encoded(Image.fromarray(noise), image_format), name="photo")
    asked: list[bool] = []

    def never() -> bool:
        asked.append(False)
        return False

    image = opened.decode(never)
    assert image.size == (300, 200)
    assert len(asked) > 50
    left = [len(asked) // 2]

    def halfway() -> bool:
        left[0] -= 1
        return left[0] < 0

    with pytest.raises(CancelledError, match="not decoded"):
        opened.decode(halfway)
    assert left == [-1]
    again = opened.decode()  # nothing of it is used up
    np.testing.assert_array_equal(np.asarray(again), np.asarray(image))


@pytest.mark.parametrize("image_format", FORMATS)
def test_decoding_has_a_time_limit(image_format: str) -> None:
    data = encoded(PHOTO, image_format)
    error = refusal(data, formats=FORMATS, decode_s=-1)
    assert error.summary == "photo takes too long to decode."
    assert error.found == "not done after -1 s"
