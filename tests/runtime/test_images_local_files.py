"""Which files of this machine are read; of the others nothing is said that is in them."""

from __future__ import annotations

import gc
import os
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from image_files import encoded
from vlmforge.api.config import VisionConfig
from vlmforge.errors import ImageError
from vlmforge.vl import load_image, local_files
from vlmforge.vl.image_limits import ImageLimits

PHOTO = encoded(Image.new("RGB", (5, 4), "red"))
SECRET = b"QZXJQKVZQWXKJZQVXK"
CLOSED = ImageLimits(local_files=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images, beside one with another image and a secret."""
    for name in ("open/deep", "closed"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "photo.png").write_bytes(PHOTO)
    (tmp_path / "open" / "photo.png").write_bytes(PHOTO)
    (tmp_path / "closed" / "secret.txt").write_bytes(SECRET)
    return tmp_path / "open"


def refusal(source: object, limits: ImageLimits) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, limits=limits)
    assert caught.value.found and caught.value.expected and caught.value.fix
    return str(caught.value)


def spellings(path: Path) -> dict[str, object]:
    return {"text": str(path), "URL": f"file://{quote(str(path))}", "path": path}


@pytest.mark.parametrize("spelling", ["text", "URL", "path"])
def test_none_is_opened_when_none_may_be(
    folder: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("a file was opened"))
    here = refusal(spellings(folder / "photo.png")[spelling], CLOSED)
    nowhere = refusal(spellings(folder / "nowhere.png")[spelling], CLOSED)
    assert here.replace("photo.png", "nowhere.png") == nowhere
    assert here.startswith("Files of this machine are not read here.")
    assert "data:image/...;base64," in here


def test_what_is_no_file_is_still_taken() -> None:
    for source in (PHOTO, Image.new("RGB", (5, 4)), "data:," + quote(PHOTO)):
        assert load_image(source, limits=CLOSED).size == (5, 4)


def test_a_closed_machine_says_nothing_of_an_address() -> None:
    texts = {refusal(f"file://{rest}", CLOSED)[:40] for rest in ("server/a", "/a", "", "%00", "[")}
    assert len(texts) == 1


@pytest.mark.parametrize("as_text", [False, True])
def test_a_folder_gives_its_files(folder: Path, as_text: bool) -> None:
    limits = ImageLimits(local_files=str(folder) if as_text else folder)
    for path in ("photo.png", "deep/photo.png", "deep/../photo.png", "deep/.././deep/photo.png"):
        for source in spellings(folder / path).values():
            assert load_image(source, limits=limits).size == (5, 4)


def test_a_link_that_stays_inside_is_followed(folder: Path) -> None:
    (folder / "link.png").symlink_to("deep/photo.png")
    (folder / "way").symlink_to(folder / "deep")
    alias = folder.parent / "alias"
    alias.symlink_to(folder)
    for root in (folder, alias):
        for path in ("link.png", "way/photo.png"):
            limits = ImageLimits(local_files=root)
            assert load_image(str(root / path), limits=limits).size == (5, 4)


ESCAPES: dict[str, Callable[[Path], str]] = {
    "absolute": lambda folder: str(folder.parent / "closed/photo.png"),
    "dots": lambda folder: f"{folder}/../closed/photo.png",
    "URL dots": lambda folder: f"file://{folder}/%2e%2e/closed/photo.png",
    "link": lambda folder: str(folder / "out.png"),
    "link to a folder": lambda folder: str(folder / "out/photo.png"),
    "a name that begins alike": lambda folder: f"{folder}2/photo.png",
    "missing": lambda folder: str(folder.parent / "closed/nowhere.png"),
    "secret": lambda folder: str(folder.parent / "closed/secret.txt"),
    "link to what is missing": lambda folder: str(folder / "nothing.png"),
    "the process": lambda _: "/proc/self/environ",
    "the process's files": lambda _: "/proc/self/fd/0",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_nothing_outside_of_the_folder_is_read(folder: Path, escape: str) -> None:
    (folder / "out.png").symlink_to("../closed/photo.png")
    (folder / "out").symlink_to("../closed")
    (folder / "nothing.png").symlink_to("/nowhere/at/all")
    text = refusal(ESCAPES[escape](folder), ImageLimits(local_files=folder))
    assert "is outside of the folder whose files are read here" in text
    assert "found:    a path that leads elsewhere" in text


@pytest.mark.parametrize("swapped", ["deep", "deep/photo.png"])
def test_a_link_that_is_laid_meanwhile_leads_nowhere(
    folder: Path, swapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a path and its opening it, or its folder, becomes a link."""
    resolve = os.path.realpath

    def then_swap(path: str | Path) -> str:
        found = resolve(path)
        if str(path).endswith("photo.png"):
            (folder / swapped).rename(folder.parent / "moved")
            (folder / swapped).symlink_to(folder.parent / "closed" / Path(swapped).name)
        return found

    (folder.parent / "closed" / "deep").symlink_to(".")
    monkeypatch.setattr(os.path, "realpath", then_swap)
    path = folder / "deep" / "photo.png"
    assert "cannot be read" in refusal(str(path), ImageLimits(local_files=folder))
    assert path.read_bytes() == PHOTO  # whoever follows the link is outside
    monkeypatch.undo()
    assert not (folder / swapped).resolve().is_relative_to(folder)


def test_the_folder_itself_is_no_image(folder: Path) -> None:
    assert "not a regular file" in refusal(str(folder), ImageLimits(local_files=folder))


def test_pipes_and_devices_are_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for limits in (ImageLimits(), ImageLimits(local_files=folder)):
        assert "not a regular file" in refusal(str(folder / "pipe"), limits)


def test_a_file_that_has_nothing_to_give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in /proc, where what blocks may be called regular."""
    os.mkfifo(folder / "pipe")
    writer = os.open(folder / "pipe", os.O_RDWR)
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: True)
    try:
        assert "it gives nothing" in refusal(str(folder / "pipe"), ImageLimits())
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    "content",
    [
        SECRET,
        b"\x89PNG\r\n\x1a\n" + SECRET * 3,
        PHOTO[:37] + SECRET + PHOTO[40:],
        PHOTO[:33] + b"\0\0\0\1" + SECRET,
        b"\xff\xd8\xff" + SECRET * 5,
        b"GIF89a" + SECRET * 3,
        b"RIFF\0\0\0\0WEBPVP8 " + SECRET * 3,
        b"BM" + SECRET * 5,
        b"II*\0\x08\0\0\0" + SECRET * 4,
        b"",
    ],
)
def test_the_content_of_a_file_is_not_quoted(folder: Path, content: bytes) -> None:
    path = folder / "odd.png"
    path.write_bytes(content)
    for limits in (ImageLimits(), ImageLimits(local_files=folder)):
        text = refusal(str(path), limits)
        assert "odd.png" in text
        for start in range(0, len(SECRET), 3):
            assert SECRET[start : start + 3].decode() not in text
    if content:
        with pytest.raises(ImageError):  # own bytes are quoted, where they help
            load_image(content)


def test_descriptors_are_closed(folder: Path) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    limits = ImageLimits(local_files=folder)
    gc.collect()  # what others left open is closed now, not meanwhile
    before = count()
    for path in (
        "deep/photo.png",
        "deep/nowhere.png",
        "deep",
        "photo.png/x",
        "../closed/photo.png",
    ):
        try:
            load_image(str(folder / path), limits=limits)
        except ImageError as error:
            assert error.fix
    assert count() == before


def test_a_file_that_grows_is_still_too_large(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat
    monkeypatch.setattr(
        local_files.os, "fstat", lambda fd: os.stat_result([*real(fd)[:6], 0, *real(fd)[7:]])
    )
    text = refusal(str(folder / "photo.png"), ImageLimits(max_bytes=len(PHOTO) - 1))
    assert "is too large" in text
    assert load_image(str(folder / "photo.png"), limits=ImageLimits(max_bytes=len(PHOTO)))


def test_the_configuration_carries_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert VisionConfig().image_limits() == ImageLimits()
    assert VisionConfig(local_files=False).image_limits().local_files is False
    monkeypatch.chdir(folder.parent)
    limits = VisionConfig(local_files="open", image_formats=["PNG"]).image_limits()
    monkeypatch.chdir("/")
    assert limits.formats == ("PNG",)
    assert load_image(str(folder / "photo.png"), limits=limits).size == (5, 4)
