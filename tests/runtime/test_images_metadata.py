"""Which way up images are, and PNGs without an end: as Pillow has it where it is right."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from image_files import encoded, jpeg_segment, png_chunk
from vlmforge.errors import ImageError
from vlmforge.vl.decode import decode_image
from vlmforge.vl.load import open_image
from vlmforge.vl.orientation import TAG, of_exif, of_xmp

PIXELS = np.random.default_rng(17).integers(0, 256, (12, 20, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)
PNG = encoded(PHOTO)
TEXTS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def exif_of(orientation: int, **more: object) -> bytes:
    exif = Image.Exif()
    exif.endian = more.pop("endian", "<")
    exif[0x010F] = "a maker whose name is longer than four bytes"
    exif[TAG] = orientation
    exif[0x0132] = "2024:01:01 00:00:00"
    return exif.tobytes()


def before_pixels(png: bytes, *chunks: bytes) -> bytes:
    return png[:33] + b"".join(chunks) + png[33:]


def behind_pixels(png: bytes, *chunks: bytes) -> bytes:
    return png[:-12] + b"".join(chunks) + png[-12:]


def hex_profile(exif: bytes) -> bytes:
    digits = exif.hex()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    return f"\nexif\n{len(exif):8}\n{lines}\n".encode()


def carriers(orientation: int) -> dict[str, bytes]:
    exif, xmp = exif_of(orientation), XMP % orientation
    profile, itxt = hex_profile(exif), b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    key = b"Raw profile type exif\0"
    smooth = PHOTO.resize((40, 24))
    jpeg = encoded(smooth, "JPEG")
    return {
        "PNG": before_pixels(PNG, png_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))),
        "PNG, behind": behind_pixels(PNG, png_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))),
        "PNG, hex": before_pixels(PNG, png_chunk(b"tEXt", key + profile)),
        "PNG, hex, zipped": behind_pixels(
            PNG, png_chunk(b"zTXt", key + b"\0" + zlib.compress(profile))
        ),
        "PNG, XMP": before_pixels(PNG, png_chunk(b"iTXt", itxt)),
        "PNG, XMP, zipped": before_pixels(
            PNG, png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp))
        ),
        "JPEG": encoded(smooth, "JPEG", exif=exif),
        "JPEG, big-endian": encoded(smooth, "JPEG", exif=exif_of(orientation, endian=">")),
        "JPEG, XMP": jpeg[:2]
        + jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)
        + jpeg[2:],
        "WEBP": encoded(PHOTO, "WEBP", exif=exif, lossless=True),
        "WEBP, XMP": encoded(PHOTO, "WEBP", xmp=xmp, lossless=True),
    }


@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 7, 9])
@pytest.mark.parametrize("carrier", carriers(1))
def test_images_are_upright_whatever_says_so(carrier: str, orientation: int) -> None:
    data = carriers(orientation)[carrier]
    opened = Image.open(io.BytesIO(data))
    opened.load()
    reference = ImageOps.exif_transpose(opened)
    image = decode_image(data, name="photo")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(reference))
    assert (image.size == PHOTO.size or image.size == (40, 24)) == (orientation not in (5, 6, 7, 8))
    assert open_image(data).size == image.size
    assert TAG not in image.getexif()


@given(
    st.integers(0, 2**16 - 1),
    st.sampled_from("<>"),
    st.dictionaries(st.sampled_from(TEXTS), st.text("abc", max_size=9), max_size=5),
)
def test_exif_is_read_as_pillow_reads_it(value: int, order: str, more: dict[int, str]) -> None:
    exif = Image.Exif()
    exif.endian = order
    for tag, text in more.items():
        exif[tag] = text
    exif[TAG] = value
    data = exif.tobytes()
    again = Image.Exif()
    again.load(data)
    assert of_exif(data) == again[TAG] == value
    assert of_exif(data.removeprefix(b"Exif\0\0")) == value
    del exif[TAG]
    assert of_exif(exif.tobytes()) is None


@given(st.data())
@settings(max_examples=100)
def test_no_exif_breaks_its_reader(data: st.DataObject) -> None:
    exif = bytearray(exif_of(6))
    for _ in range(data.draw(st.integers(1, 6))):
        exif[data.draw(st.integers(0, len(exif) - 1))] = data.draw(st.integers(0, 255))
    found = of_exif(bytes(exif[: data.draw(st.integers(0, len(exif)))]))
    assert found is None or 0 <= found < 2**32


@given(st.binary(max_size=200))
def test_no_bytes_break_the_readers_of_metadata(data: bytes) -> None:
    assert of_exif(data) is None or data[:2] in (b"II", b"MM", b"Ex")
    assert of_xmp(data) is None


# --- the end of a PNG ----------------------------------------------------------------------------


def pillow_reads(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("accept_truncated", [False, True])
def test_a_png_is_whole_when_its_pixels_are(
    interlaced: bool, accept_truncated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere: the same pixels or an error, and an error only where Pillow has one."""
    data = ADAM7 if interlaced else behind_pixels(PNG, png_chunk(b"tEXt", b"Comment\0behind"))
    expected = np.asarray(Image.open(io.BytesIO(data)))
    taken = [cut for cut in range(len(data)) if pillow_reads(data[:cut])]
    assert taken and taken[0] < len(data) - 12
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", accept_truncated)
    ours = []
    for cut in range(40, len(data)):
        try:
            image = decode_image(data[:cut], name="photo")
        except ImageError as error:
            assert "photo" in error.summary and error.found
        else:
            ours.append(cut)
            np.testing.assert_array_equal(np.asarray(image), expected)
    assert set(taken) <= set(ours)
    assert ours == list(range(ours[0], len(data)))


def interlaced_png() -> bytes:
    """Adam7, which Pillow does not write: 8-bit grey, every pass without filters."""
    grey = PIXELS[..., 0]
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    rows = b""
    for x, y, across, down in (*passes, (0, 1, 1, 2)):
        rows += b"".join(b"\0" + row.tobytes() for row in grey[y::down, x::across])
    header = PHOTO.width.to_bytes(4, "big") + PHOTO.height.to_bytes(4, "big") + b"\x08\0\0\0\1"
    return PNG[:8] + b"".join(
        png_chunk(kind, payload)
        for kind, payload in (
            (b"IHDR", header),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
    )


ADAM7 = interlaced_png()


def test_an_interlaced_png() -> None:
    np.testing.assert_array_equal(np.asarray(decode_image(ADAM7, name="p")), PIXELS[..., 0])


@pytest.mark.parametrize(
    "end",
    [
        b"",
        PNG[-12:-1],
        PNG[-12:-4] + b"\0\0\0\0",
        png_chunk(b"tEXt", b"Comment\0cut")[:-6],
        b"\0\0\xff\xfftEXtComment\0runs past the end",
        png_chunk(b"tEXt", b"Comment\0wrong")[:-4] + b"\0\0\0\0" + PNG[-12:],
        b"what was appended to the file" * 9,
        PNG[-12:] + b"an archive behind the image",
    ],
)
def test_what_is_behind_the_pixels_of_a_png_does_not_matter(end: bytes) -> None:
    np.testing.assert_array_equal(np.asarray(decode_image(PNG[:-12] + end, name="p")), PIXELS)


def test_the_pixels_of_a_png_may_lie_in_many_chunks() -> None:
    start = PNG.index(b"IDAT")
    pixels = PNG[start + 4 : -16]
    pieces = [pixels[i : i + 7] for i in range(0, len(pixels), 7)]
    chunks = b"".join(png_chunk(b"IDAT", piece) for piece in [b"", *pieces, b""])
    data = PNG[: start - 4] + chunks + PNG[-12:]
    np.testing.assert_array_equal(np.asarray(decode_image(data, name="p")), PIXELS)


def test_an_animated_png_is_its_first_frame() -> None:
    frames = [PHOTO, PHOTO.rotate(180)]
    data = encoded(frames[0], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(np.asarray(decode_image(data, name="p")), PIXELS)
    apart = encoded(frames[0], save_all=True, append_images=frames[1:], default_image=True)
    np.testing.assert_array_equal(np.asarray(decode_image(apart, name="p")), PIXELS)
