from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.fingerprint import fingerprint, input_files

_MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    (made / "config.json").write_bytes(b"{}")
    (made / "small.bin").write_bytes(bytes(_MIB))
    (made / "large.bin").write_bytes(bytes(_MIB + 1))
    return made


def _print(*folders: Path) -> str:
    return fingerprint(input_files(folders))


def _stamp(path: Path, *, by: int) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + by))


def test_is_a_sha256_that_does_not_depend_on_order_or_place(folder: Path) -> None:
    expected = _print(folder)
    assert len(bytes.fromhex(expected)) == 32
    assert fingerprint(sorted(folder.iterdir(), reverse=True)) == expected
    moved = folder.rename(folder.with_name("elsewhere"))
    assert _print(moved) == expected


def test_copy_with_times_is_the_same(folder: Path, tmp_path: Path) -> None:
    assert _print(Path(shutil.copytree(folder, tmp_path / "copy"))) == _print(folder)


def test_further_chat_templates_count(folder: Path) -> None:
    """A build reads the one called "default" from a folder of its own."""
    before = _print(folder)
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "default.jinja").write_text("one", "utf-8")
    one = _print(folder)
    (more / "default.jinja").write_text("two", "utf-8")
    assert len({before, one, _print(folder)}) == 3
    (folder / "unread").mkdir()
    (folder / "unread" / "config.json").write_bytes(b"{}")
    shutil.rmtree(more)
    assert _print(folder) == before


@pytest.mark.parametrize("name", ["config.json", "small.bin"])
def test_small_files_count_by_content_only(folder: Path, name: str) -> None:
    before = _print(folder)
    _stamp(folder / name, by=1)
    assert _print(folder) == before
    status = (folder / name).stat()
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + b"x")
    os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert _print(folder) != before


def test_large_files_count_by_size_and_time(folder: Path) -> None:
    before = _print(folder)
    _stamp(folder / "large.bin", by=1)
    assert _print(folder) != before
    _stamp(folder / "large.bin", by=-1)
    assert _print(folder) == before
    status = (folder / "large.bin").stat()
    (folder / "large.bin").write_bytes(bytes(_MIB + 2))
    os.utime(folder / "large.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert _print(folder) != before


def test_misses_what_its_words_say_and_no_more(folder: Path) -> None:
    before, path = _print(folder), folder / "large.bin"
    status = path.stat()
    path.write_bytes(b"x" * (_MIB + 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert _print(folder) == before


def test_names_and_number_of_files_count(folder: Path) -> None:
    before = _print(folder)
    (folder / "config.json").rename(folder / "config2.json")
    renamed = _print(folder)
    assert renamed != before
    (folder / "extra.txt").touch()
    assert _print(folder) not in (before, renamed)


def test_which_of_two_folders_a_file_is_in_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for place, text in ((first, "one"), (second, "two")):
        place.mkdir()
        (place / "config.json").write_text(text)
    assert _print(first, second) != _print(second, first)
    assert _print(first, second) != _print(first)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.bin cannot be read\.") as caught:
        fingerprint([tmp_path / "gone.bin"])
    assert caught.value.found == "No such file or directory"
