"""open_image: what is known of an image before its pixels are, and who decodes them, and when."""

from __future__ import annotations

import io
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from conftest import HANGS
from image_files import encoded, png_header
from vlmforge.errors import CancelledError, ImageError
from vlmforge.vl import lanes, load_image
from vlmforge.vl.decode import to_rgb
from vlmforge.vl.image_limits import ImageLimits
from vlmforge.vl.load import open_image

PIXELS = np.random.default_rng(29).integers(0, 256, (11, 17, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)
PATIENT = ImageLimits(decode_s=HANGS)
EXIF = Image.Exif()
EXIF[0x0112] = 6


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_no_pixel_is_decoded_to_know_an_image(
    image_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo"
    turned = image_format in ("PNG", "JPEG", "WEBP")
    path.write_bytes(encoded(PHOTO, image_format, **({"exif": EXIF} if turned else {})))
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
        opened = open_image(path)
        assert opened.size == ((11, 17) if turned else (17, 11))
        assert opened.name == str(path)
        assert open_image(path.read_bytes()).name is None
        assert len(opened.digest) == 16
        with pytest.raises(ImageError, match="17 x 11 = 187 pixels"):
            open_image(path, limits=ImageLimits(max_pixels=186))
    image = opened.decode()
    assert image.size == opened.size
    assert image.filename == opened.name
    np.testing.assert_array_equal(np.asarray(image), np.asarray(load_image(path)))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(opened.decode(lambda: False)))


def test_the_header_of_a_whole_album_costs_nothing() -> None:
    """Thirty images of 100 megapixels each: 9 GB if one pixel of each were touched."""
    data = png_header(10_000, 10_000)
    opened = [open_image(data) for _ in range(30)]
    assert {image.size for image in opened} == {(10_000, 10_000)}
    assert len({image.digest for image in opened}) == 1


def test_digests_tell_contents_apart() -> None:
    flipped = PIXELS.copy()
    flipped[3, 4, 1] ^= 1
    one, two = Image.new("P", (2, 1)), Image.new("P", (2, 1))
    one.putpalette([1, 2, 3])
    two.putpalette([3, 2, 1])
    clear = one.copy()
    clear.info["transparency"] = 0
    turned, flipped_by_tag = PHOTO.copy(), PHOTO.copy()
    turned.getexif()[0x0112] = 6
    flipped_by_tag.getexif()[0x0112] = 2
    sources = [
        encoded(PHOTO),
        encoded(PHOTO, exif=EXIF),
        encoded(PHOTO, "BMP"),
        encoded(Image.fromarray(flipped)),
        PIXELS,
        flipped,
        PIXELS.reshape(17, 11, 3),
        np.dstack([PIXELS, PIXELS[..., 0]]),
        PHOTO.convert("L"),
        PHOTO.convert("L").convert("RGB"),
        one,
        two,
        clear,
        turned,
        flipped_by_tag,
    ]
    digests = [open_image(source).digest for source in sources]
    assert len(set(digests)) == len(sources)
    assert digests == [open_image(source).digest for source in sources]


def test_digests_do_not_depend_on_where_an_image_is_from(tmp_path: Path) -> None:
    data = encoded(PHOTO)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert open_image(path).digest == open_image(data).digest
    assert open_image(PIXELS).digest == open_image(PHOTO).digest
    assert open_image(Image.open(path)).digest == open_image(PHOTO).digest


def test_an_array_may_change_after_it_was_given() -> None:
    array = PIXELS.copy()
    opened = open_image(array)
    array[:] = 0
    np.testing.assert_array_equal(np.asarray(opened.decode()), PIXELS)
    assert opened.digest == open_image(PIXELS).digest


@pytest.mark.parametrize("behind", [False, True])
def test_a_pillow_image_is_as_large_as_it_becomes(behind: bool) -> None:
    data = encoded(PHOTO, exif=EXIF)
    if behind:  # EXIF may stand behind the pixels of a PNG
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        data = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    image = Image.open(io.BytesIO(data))
    opened = open_image(image)
    assert opened.size == to_rgb(image).size == (11, 17)
    assert opened.decode() is image


# --- Pillow images whose file is gone ------------------------------------------------------------


def closed_early(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image


def closed_itself(path: Path) -> Image.Image:
    image = Image.open(path)
    image.close()
    return image


def closed_file(path: Path) -> Image.Image:
    with path.open("rb") as file:
        return Image.open(file)


def closed_in_memory(_: Path) -> Image.Image:
    image = PHOTO.copy()
    image.close()
    return image


CLOSED = {f.__name__: f for f in (closed_early, closed_itself, closed_file, closed_in_memory)}


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("how", CLOSED)
def test_a_closed_image_is_named(how: str, image_format: str, tmp_path: Path) -> None:
    path = tmp_path / "photo"
    path.write_bytes(encoded(PHOTO, image_format))
    image = CLOSED[how](path)
    if image_format == "WEBP" and how in ("closed_early", "closed_file"):
        assert load_image(image) is image  # its reader has all the bytes by then
        return
    with pytest.raises(ImageError) as caught:
        load_image(image)
    assert caught.value.summary == "The Pillow image was closed before its pixels were read."
    assert "image.load()" in caught.value.fix


def test_a_loaded_image_may_be_closed_behind_us(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(PHOTO))
    with Image.open(path) as image:
        image.load()
    assert load_image(image) is image
    with path.open("rb") as file:
        lazy = Image.open(file)
        opened = open_image(lazy)
        np.testing.assert_array_equal(np.asarray(opened.decode()), PIXELS)


def test_one_image_in_two_prompts_is_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads in Pillow's reader of one image read each other's bytes."""
    path = tmp_path / "photo.bmp"
    path.write_bytes(encoded(PHOTO, "BMP"))
    lazy, load = Image.open(path), ImageFile.ImageFile.load
    inside, second = [0], threading.Event()

    def watched(image: ImageFile.ImageFile) -> object:
        inside[0] += 1
        if inside[0] == 2:
            second.set()
        second.wait(0.2)  # time for the other one to come in, if it may
        found = load(image)
        inside[0] -= 1
        return found

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    opened = [open_image(lazy) for _ in range(2)]
    threads = [threading.Thread(target=image.decode) for image in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not second.is_set()
    np.testing.assert_array_equal(np.asarray(lazy), PIXELS)


def test_an_image_that_does_not_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", no_memory)
    with pytest.raises(ImageError, match="does not fit the memory") as caught:
        load_image(encoded(PHOTO))
    assert caught.value.found == "17 x 11 pixels of mode RGB"


# --- lanes ---------------------------------------------------------------------------------------


class Gate:
    """Decoders stop here until they may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Semaphore(0), threading.Event()
        self.inside, self.most = 0, 0
        self._lock = threading.Lock()
        load = ImageFile.ImageFile.load

        def gated(image: ImageFile.ImageFile) -> object:
            with self._lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            self.entered.release()
            assert self.open.wait(HANGS)
            with self._lock:
                self.inside -= 1
            return load(image)

        monkeypatch.setattr(ImageFile.ImageFile, "load", gated)


def test_a_cancelled_caller_does_not_wait_for_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, cancelled = Gate(monkeypatch), threading.Event()
    opened = open_image(encoded(PHOTO), limits=PATIENT)
    errors: list[CancelledError] = []

    def ask() -> None:
        with pytest.raises(CancelledError) as caught:
            opened.decode(cancelled.is_set)
        errors.append(caught.value)

    caller = threading.Thread(target=ask)
    caller.start()
    assert gate.entered.acquire(timeout=HANGS)
    cancelled.set()
    caller.join(HANGS)  # although its decoder stands still
    left, inside = caller.is_alive(), gate.inside
    gate.open.set()
    assert not left
    assert inside == 1
    assert errors[0].found == "a request that was cancelled"
    assert opened.decode(lambda: False).size == (17, 11)


def test_few_images_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    opened = open_image(encoded(PHOTO), limits=PATIENT)
    done: list[Image.Image] = []
    callers = [
        threading.Thread(target=lambda: done.append(opened.decode(lambda: False)))
        for _ in range(lanes.LANES + 4)
    ]
    for caller in callers:
        caller.start()
    for _ in range(lanes.LANES):
        assert gate.entered.acquire(timeout=HANGS)
    waiting = threading.Event()
    waiting.set()
    try:
        with pytest.raises(CancelledError):  # one that has no lane yet can be cancelled too
            opened.decode(waiting.is_set)
    finally:
        gate.open.set()
    for caller in callers:
        caller.join(HANGS)
    assert gate.most == lanes.LANES
    assert len(done) == len(callers)


def test_errors_come_through_a_lane() -> None:
    opened = open_image(encoded(PHOTO)[:-300])
    with pytest.raises(ImageError, match="truncated"):
        opened.decode(lambda: False)


def test_a_forked_process_has_lanes_of_its_own() -> None:
    opened = open_image(encoded(PHOTO))
    opened.decode(lambda: False)  # the threads of this process are there
    child = os.fork()
    if child == 0:
        signal.alarm(int(HANGS))  # a child that hangs must not stay
        try:
            assert opened.decode(lambda: False).size == (17, 11)
            os._exit(0)
        finally:
            os._exit(1)  # nor go on with the tests
    assert os.waitpid(child, 0)[1] == 0
