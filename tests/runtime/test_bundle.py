"""Opening an engine directory: every file that it uses is the file that was built."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

from sample_manifest import MANIFEST, PARTS, with_files
from vlmforge.backends import LoadOptions
from vlmforge.engine.bundle import check_hashes, check_sizes, open_bundle
from vlmforge.engine.manifest import MANIFEST_FILE, FileEntry, Manifest, dump_manifest
from vlmforge.errors import EngineError, EngineFormatError, EngineIntegrityError
from vlmforge.inputs.template_choice import ActiveTemplate
from vlmforge.runner.load import load_engine

NAMES = (
    *("vision.onnx", "vision.data", "decoder.rank0.onnx", "decoder.rank0.data"),
    *("tokenizer.json", "chat_template.jinja", "goldens/case.npz"),
)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMFORGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "engine"
    (folder / "goldens").mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_text(f"content of {name} {{{{ ü }}}}\n", "utf-8")
    return describe(folder, with_files(tuple(entry(folder, name) for name in NAMES)))


def entry(folder: Path, name: str) -> FileEntry:
    data = (folder / name).read_bytes()
    return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def describe(folder: Path, manifest: Manifest) -> Path:
    (folder / MANIFEST_FILE).write_text(dump_manifest(manifest), "utf-8")
    return folder


def stamps(engine: Path) -> list[Path]:
    return sorted((engine.parent / "cache" / "verified").glob("*"))


def flip(path: Path) -> None:
    """Change one byte, and nothing else that a look at the folder could tell."""
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


def test_a_whole_engine_opens(engine: Path) -> None:
    bundle = open_bundle(engine)
    assert bundle.folder == engine
    assert bundle.manifest.files == tuple(entry(engine, name) for name in NAMES)
    assert bundle.text("chat_template.jinja") == "content of chat_template.jinja {{ ü }}\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_short_or_altered_file_is_named(engine: Path, name: str) -> None:
    path = engine / name
    built, expected = path.read_bytes(), entry(engine, name)

    def refused(change: Callable[[], object]) -> EngineIntegrityError:
        path.write_bytes(built)
        change()
        with pytest.raises(EngineIntegrityError) as caught:
            open_bundle(engine)
        assert caught.value.summary == f"{path} is not the file that was built."
        assert caught.value.expected == f"{expected.size} bytes, sha256 {expected.sha256}"
        assert "build-engine CHECKPOINT -o ENGINE --force" in caught.value.fix
        return caught.value

    assert refused(path.unlink).found == "No such file or directory"
    assert refused(lambda: path.write_bytes(built[:-1])).found == f"{len(built) - 1} bytes"
    found = refused(lambda: flip(path)).found
    assert found == f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_success_is_remembered_and_a_change_forgets_it(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_bundle(engine)
    assert len(stamps(engine)) == 1
    with monkeypatch.context() as patch:
        patch.setattr("vlmforge.engine.bundle.check_hashes", None)  # would raise when called
        open_bundle(engine)
    flip(engine / "vision.data")
    with pytest.raises(EngineIntegrityError):
        open_bundle(engine)
    assert len(stamps(engine)) == 1  # a failure is not remembered


def test_an_altered_file_is_seen_though_its_time_of_change_was_set_back(engine: Path) -> None:
    open_bundle(engine)
    path = engine / "decoder.rank0.data"
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(EngineIntegrityError):
        open_bundle(engine)


def test_another_manifest_is_not_taken_on_the_word_of_the_first(engine: Path) -> None:
    bundle = open_bundle(engine)
    lie = structs.replace(bundle.manifest.files[0], sha256="0" * 64)
    describe(engine, with_files((lie, *bundle.manifest.files[1:])))
    with pytest.raises(EngineIntegrityError, match=r"vision\.onnx"):
        open_bundle(engine)


def test_check_hashes_trusts_no_memory(engine: Path) -> None:
    bundle = open_bundle(engine)
    flip(engine / "goldens/case.npz")
    with pytest.raises(EngineIntegrityError, match=r"case\.npz"):
        check_hashes(bundle)


@pytest.mark.parametrize("cache", ["/dev/null/cache", "x" * 300, "a-file"])
def test_an_unusable_cache_costs_time_and_nothing_else(
    engine: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.chdir(engine.parent)
    Path("a-file").touch()
    monkeypatch.setenv("VLMFORGE_CACHE", cache)
    assert open_bundle(engine).folder == engine
    flip(engine / "vision.onnx")
    with pytest.raises(EngineIntegrityError):
        open_bundle(engine)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "goldens/../../outside"])
def test_no_file_may_lie_outside(engine: Path, name: str) -> None:
    (engine.parent / "outside").write_bytes(b"x")
    files = (*(entry(engine, listed) for listed in NAMES), FileEntry(name, 1, "0" * 64))
    describe(engine, with_files(files))
    with pytest.raises(EngineFormatError) as caught:
        open_bundle(engine)
    assert caught.value.summary == "engine.json.files[7].path must be a path inside the engine."
    assert caught.value.found == repr(name)


PROMPT = MANIFEST.prompt
UNLISTED: dict[str, Callable[[str], Manifest]] = {
    "tokenizer": lambda name: structs.replace(MANIFEST, tokenizer_file=name),
    "template": lambda name: structs.replace(
        MANIFEST, prompt=structs.replace(PROMPT, template_file=name)
    ),
    "part": lambda name: structs.replace(
        MANIFEST, parts=(structs.replace(PARTS[0], file=name), PARTS[1])
    ),
    "data": lambda name: structs.replace(
        MANIFEST, parts=(structs.replace(PARTS[0], data=("vision.data", name)), PARTS[1])
    ),
}


@pytest.mark.parametrize("name", ["unlisted", "../outside", "/etc/hostname"])
@pytest.mark.parametrize("use", UNLISTED)
def test_no_file_is_used_that_was_not_checked(engine: Path, use: str, name: str) -> None:
    for path in (engine / "unlisted", engine.parent / "outside"):
        path.write_bytes(b"planted")
    files = tuple(entry(engine, name) for name in NAMES)
    describe(engine, structs.replace(UNLISTED[use](name), files=files))
    with pytest.raises(EngineFormatError) as caught:
        open_bundle(engine)
    inside = name == "unlisted"
    unlisted, outside = "uses a file that it does not list", "must be a path inside the engine"
    assert (unlisted if inside else outside) in caught.value.summary
    assert caught.value.found == repr(name)


@pytest.mark.parametrize("name", NAMES[:2])
def test_what_is_no_file_is_not_read(engine: Path, name: str) -> None:
    path = engine / name
    path.unlink()
    for make in (
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
    ):
        make()
        with pytest.raises(EngineIntegrityError) as caught:
            open_bundle(engine)
        assert caught.value.found == "not a regular file"
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_folder_of_links_is_an_engine(engine: Path) -> None:
    """As download caches keep it: the sha256 says what is behind a link."""
    (engine.parent / "blob").write_bytes((engine / "vision.data").read_bytes())
    (engine / "vision.data").unlink()
    (engine / "vision.data").symlink_to(engine.parent / "blob")
    assert open_bundle(engine).folder == engine


def test_a_text_that_is_none_is_named(engine: Path) -> None:
    bundle = open_bundle(engine)
    (engine / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(EngineIntegrityError, match=r"chat_template\.jinja cannot be read"):
        bundle.text("chat_template.jinja")
    with pytest.raises(EngineIntegrityError, match="goldens cannot be read") as caught:
        bundle.text("goldens")
    assert caught.value.found == "not a regular file"


def test_a_file_that_was_cut_since_it_was_opened_is_named(engine: Path) -> None:
    bundle = open_bundle(engine)
    check_sizes(bundle)
    os.truncate(engine / "decoder.rank0.data", 3)
    with pytest.raises(
        EngineIntegrityError, match=r"decoder\.rank0\.data is not the file"
    ) as caught:
        check_sizes(bundle)
    assert caught.value.found == "3 bytes"


TOKENIZER = Path(__file__).parents[1] / "data/llava_1_5_hf/checkpoint/tokenizer.json"


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_that_is_cut_while_it_is_loaded_is_named(
    engine: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    (engine / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    describe(engine, with_files(tuple(entry(engine, name) for name in NAMES)))
    bundle = open_bundle(engine)

    class Cutting:
        def load_vision(self, folder: Path, *_: object) -> None:
            os.truncate(folder / "vision.data", 3)

        def load_decoder(self, *_: object) -> None:
            if fails:
                raise EngineError("cannot load")

    monkeypatch.setattr("vlmforge.runner.load.load_backend", lambda name: Cutting())
    with pytest.raises(EngineIntegrityError, match=r"vision\.data is not the file") as caught:
        load_engine(bundle, ActiveTemplate("plain", "", ()), LoadOptions(slots=1, capacity=8))
    assert caught.value.found == "3 bytes"
