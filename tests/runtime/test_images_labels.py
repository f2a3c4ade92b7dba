"""The bytes say what an image is: data URLs, content types, file names and base64 do not."""

from __future__ import annotations

import base64
import binascii
import threading
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from image_files import encoded
from image_server import Handler, Server
from vlmforge.errors import ImageError
from vlmforge.inputs.messages import is_image_address, parse_prompt
from vlmforge.vl import load_image
from vlmforge.vl.data_url import data_url_bytes, decoded_base64
from vlmforge.vl.image_limits import DEFAULT_FORMATS, ImageLimits

PIXELS = np.random.default_rng(23).integers(0, 256, (13, 17, 3), dtype=np.uint8)
PNG = encoded(Image.fromarray(PIXELS))
TEXT = base64.b64encode(PNG).decode()

HEADS = [
    "data:image/png;base64,",
    "data:image;base64,",
    "data:;base64,",
    "data:application/octet-stream;base64,",
    "data:image/jpeg;base64,",
    "data:text/plain;charset=utf-8;base64,",
    "DATA:Image/PNG; BASE64 ,",
    "data:image/png;name=a.png;base64,",
]


def refusal(source: object, **limits: object) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, limits=ImageLimits(**limits))
    assert caught.value.found and caught.value.expected and caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("head", HEADS)
def test_the_head_of_a_data_url_does_not_matter(head: str) -> None:
    np.testing.assert_array_equal(np.asarray(load_image(head + TEXT)), PIXELS)


@pytest.mark.parametrize("head", ["data:,", "data:image/png,", "data:;charset=x,"])
def test_data_may_be_percent_encoded(head: str) -> None:
    np.testing.assert_array_equal(np.asarray(load_image(head + quote_from_bytes(PNG))), PIXELS)


@pytest.mark.parametrize("head", HEADS)
def test_what_is_in_it_is_said_whatever_the_head_says(head: str) -> None:
    text = refusal(head + base64.b64encode(b"please look at this").decode())
    assert "The image of the data: URL is not an image that can be read." in text
    assert "b'please look at t'" in text


@given(st.binary(max_size=60), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_base64_is_taken_in_every_common_form(
    data: bytes, url_safe: bool, padded: bool, lines: bool, quoted: bool
) -> None:
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    text = "\r\n".join(text[i : i + 8] for i in range(0, len(text), 8)) if lines else text
    text = quote(text, safe="") if quoted else text
    assert data_url_bytes(f"data:;base64,{text}") == data


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("aGVs*G8=", "base64 data"),
        ("aGVsb", "cannot be 1 more than"),
        ("aGVsbG8===", "padding"),
        ("aGV=sbG8", "adding"),
        ("aGVs\u00e9G8=", "base64 data"),
    ],
)
def test_damaged_base64_is_not_guessed_at(text: str, why: str) -> None:
    error = refusal(f"data:image/png;base64,{text}")
    assert error.startswith("The base64 of an image is damaged.")
    assert why in error


@given(st.text("ab+/-_= \n*", max_size=12))
def test_base64_is_read_as_the_library_reads_it(text: str) -> None:
    """Whatever the strict decoder takes as it stands, we take alike."""
    try:
        expected = base64.b64decode(text, validate=True)
    except binascii.Error:
        return
    assert decoded_base64(text.encode()) == expected


def test_a_data_url_without_a_comma() -> None:
    text = refusal("data:image/png;base64")
    assert text.startswith("A data: URL has no data.")
    assert "put a comma" in text


@pytest.mark.parametrize("image_format", DEFAULT_FORMATS)
@pytest.mark.parametrize("limits", [{}, {"local_files": False}, {"local_files": "/usr"}])
def test_base64_without_its_head_is_named(image_format: str, limits: dict[str, object]) -> None:
    text = base64.b64encode(encoded(Image.fromarray(PIXELS), image_format)).decode()
    for given_text in (text, text[:76] + "\n" + text[76:152]):
        message = refusal(given_text, **limits)
        assert message.startswith("The base64 of an image lacks its prefix.")
        assert f"put data:image/{image_format.lower()};base64, in front of it" in message
        assert len(message) < 500


@pytest.mark.parametrize("text", ["iVBORw0KGgo.png", "/9j/photo.jpg", "Qkitchen " * 9, "/9j/" * 3])
def test_paths_that_begin_like_base64_are_paths(text: str) -> None:
    assert "does not exist" in refusal(text)


def test_a_file_whose_name_is_base64_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = TEXT[:60].replace("/", "a")
    Path(name).write_bytes(PNG)
    np.testing.assert_array_equal(np.asarray(load_image(name)), PIXELS)


@pytest.mark.parametrize("image_format", DEFAULT_FORMATS)
@pytest.mark.parametrize("label", ["png", "jpeg", "webp", "txt", "exe", ""])
def test_the_name_of_a_file_does_not_matter(
    image_format: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(Image.fromarray(PIXELS).convert("L"), image_format)
    expected = np.asarray(load_image(data))
    path = tmp_path / f"photo.{label}"
    path.write_bytes(data)
    for source in (path, f"data:image/{label};base64,{base64.b64encode(data).decode()}"):
        np.testing.assert_array_equal(np.asarray(load_image(source)), expected)


class LabelledHandler(Handler):
    """Sends a PNG under the content type that its path names."""

    def do_GET(self) -> None:
        self.start(200, Content_Length=str(len(PNG)), Content_Type=self.path[1:])
        self.wfile.write(PNG)


@pytest.mark.parametrize("label", ["image/jpeg", "text/html", "application/octet-stream", "x"])
def test_a_content_type_does_not_matter(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMFORGE_ALLOW_PRIVATE_URLS", "1")
    with Server() as server:
        server.RequestHandlerClass = LabelledHandler
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            image = load_image(f"http://127.0.0.1:{server.server_address[1]}/{label}")
        finally:
            server.shutdown()
            thread.join()
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize(
    "text", ["data:;base64,aGk=", "data:image,x", "DATA:a/b;base64,", "FILE:///a", "Https://a/b"]
)
def test_an_address_is_known_in_either_place_of_a_tuple(text: str) -> None:
    assert is_image_address(text)
    for prompt in ((text, "what is it?"), ("what is it?", text)):
        (message,) = parse_prompt(prompt).messages
        assert [image.source for image in message.images] == [text]
        assert message.texts == ("what is it?",)


@pytest.mark.parametrize("text", ["data: 1, 2, 3", "data:1,2,3 plotted", "database;base64,"])
def test_text_about_data_is_text(text: str) -> None:
    assert not is_image_address(text)
    (message,) = parse_prompt((text, "plot.png")).messages
    assert message.texts == (text,)
