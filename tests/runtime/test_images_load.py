"""load_image: every kind of source gives the same image, every wrong one a clear error."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest
from PIL import Image

from vlmforge.errors import ImageError
from vlmforge.vl import load_image
from vlmforge.vl.constants import IMAGE_TOKEN
from vlmforge.vl.image_limits import ImageLimits

PIXELS = np.random.default_rng(3).integers(0, 256, (11, 17, 3), dtype=np.uint8)


@pytest.fixture
def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format="PNG")
    return buffer.getvalue()


def refusal(source: object, **options: ImageLimits) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    assert caught.value.found and caught.value.expected and caught.value.fix
    return str(caught.value)


def test_every_source_gives_the_same_image(png: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a photo é.png"
    path.write_bytes(png)
    text = base64.b64encode(png).decode()
    sources = [
        path,
        str(path),
        f"file://{quote(str(path))}",
        f"FILE://localhost{quote(str(path))}",
        png,
        PIXELS,
        PIXELS[::-1][::-1],
        f"data:image/png;base64,{text}",
        f"DATA:image/png;name=x;BASE64,{quote(text, safe='')}",
        "data:image/png;base64," + "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        "data:image/png," + quote_from_bytes(png),
    ]
    for source in sources:
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_a_loaded_image_knows_where_it_is_from(png: bytes, tmp_path: Path) -> None:
    """As one that `PIL.Image.open` opens: prompts may spell it. Its bytes alone have no name."""
    path = tmp_path / "a b.png"
    path.write_bytes(png)
    url = f"file://{quote(str(path))}"
    for source, name in ((str(path), str(path)), (path, str(path)), (url, url)):
        assert getattr(load_image(source), "filename", None) == name
    assert not hasattr(load_image(png), "filename")
    assert not hasattr(load_image(path).copy(), "filename")


def test_a_pillow_image_is_returned_itself(png: bytes) -> None:
    for image in (Image.fromarray(PIXELS), Image.open(io.BytesIO(png)), Image.new("LA", (2, 3))):
        assert load_image(image) is image


def test_a_pillow_image_is_checked(png: bytes) -> None:
    assert "truncated" in refusal(Image.open(io.BytesIO(png[:-200])))
    assert "has no pixels" in refusal(Image.new("RGB", (0, 5)))
    text = refusal(Image.new("RGB", (6, 5)), limits=ImageLimits(max_pixels=29))
    assert "6 x 5 = 30 pixels" in text


@pytest.mark.parametrize(
    ("shape", "mode"), [((4, 5), "L"), ((4, 5, 3), "RGB"), ((4, 5, 4), "RGBA")]
)
def test_arrays_keep_their_mode_and_are_copied(shape: tuple[int, ...], mode: str) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    image = load_image(array)
    before = array.copy()
    array[:] = 0
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image), before)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((4, 5, 3), np.float32), "float32 of shape (4, 5, 3)"),
        (np.zeros((3, 4, 5), np.uint8), "uint8 of shape (3, 4, 5)"),
        (np.zeros((1, 4, 5, 3), np.uint8), "uint8 of shape (1, 4, 5, 3)"),
        (np.zeros(4, np.uint8), "uint8 of shape (4,)"),
        (np.zeros((0, 5, 3), np.uint8), "5 x 0 = 0 pixels"),
    ],
)
def test_arrays_of_another_form_are_refused(array: np.ndarray, found: str) -> None:
    assert found in refusal(array)


def test_a_missing_file() -> None:
    text = refusal("/nowhere/cat.png")
    assert "found:    no such file" in text
    assert "/nowhere/cat.png" in text
    assert "prompt" not in text


@pytest.mark.parametrize("prompt", ["What is in the picture?", "x " * 5000])
def test_text_that_was_meant_as_a_prompt(prompt: str) -> None:
    text = refusal(prompt)
    assert len(text) < 600
    assert "if this text is a prompt" in text


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "not a regular file" in refusal(tmp_path)
    assert "not a regular file" in refusal("/dev/zero")
    assert "found:    embedded null" in refusal("a\0b.png")
    (tmp_path / "notes.txt").write_text("hello")
    text = refusal(tmp_path / "notes.txt")
    assert "notes.txt is not an image that can be read" in text
    (tmp_path / "empty.png").touch()
    assert "empty.png is empty" in refusal(tmp_path / "empty.png")


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(10_000)
    text = refusal(path, limits=ImageLimits(max_bytes=100))
    assert "found:    10000 bytes" in text
    assert "at most 100 bytes" in text


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64", "has no data"),
        ("data:text/plain;base64,aGVsbG8=", "not an image that can be read"),
        ("data:,hello", "not an image that can be read"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,aGVsb", "base64 of an image is damaged"),
        ("data:image/png;base64,aGV*bG8=", "base64 of an image is damaged"),
        ("data:image/png;base64,aGVsbG8=", "not an image that can be read"),
        ("ftp://host/a.png", "not read from ftp://"),
        ("s3://bucket/a.png", "download the image"),
        ("file://server/share/a.png", "names another machine"),
        ("file:///nowhere/a%20b.png", "/nowhere/a b.png"),
    ],
)
def test_urls_that_hold_no_image(url: str, words: str) -> None:
    assert words in refusal(url)


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {"url": "a.png"}])
def test_other_types_are_refused_by_name(source: object) -> None:
    assert f"found:    {type(source).__name__}" in refusal(source)


def test_the_token() -> None:
    assert IMAGE_TOKEN == "<IMAGE_TOKEN>"


def test_importing_and_loading_a_file_needs_no_http(png: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png)
    program = (
        "import sys; from vlmforge.vl import load_image; "
        f"load_image({str(path)!r}); "
        "print([m for m in ('http', 'ssl', 'urllib.request', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
