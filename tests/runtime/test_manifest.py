"""`engine.json`: what is written is what is read, and anything else is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct, structs

from sample_manifest import MANIFEST
from vlmforge.engine.manifest import (
    MANIFEST_FILE,
    KVLayout,
    dump_manifest,
    load_manifest,
    manifest_digest,
)
from vlmforge.errors import EngineFormatError


def write(folder: Path, text: str) -> Path:
    (folder / MANIFEST_FILE).write_text(text, "utf-8")
    return folder


def signed(data: dict[str, Any]) -> str:
    """The text of a manifest whose digest fits its values."""
    return json.dumps({**data, "digest": manifest_digest(data)})


def refusal(folder: Path) -> EngineFormatError:
    with pytest.raises(EngineFormatError) as caught:
        load_manifest(folder)
    return caught.value


def sample() -> dict[str, Any]:
    """The sample manifest as parsed JSON, without its digest."""
    data: dict[str, Any] = json.loads(dump_manifest(MANIFEST))
    del data["digest"]
    return data


def test_the_order_in_which_mappings_were_filled_does_not_show() -> None:
    words = {"b": "1", "a": "2", "c": "3"}
    one, other = (
        structs.replace(MANIFEST.provenance, versions=versions, options=versions)
        for versions in (words, dict(reversed(words.items())))
    )
    texts = {dump_manifest(structs.replace(MANIFEST, provenance=p)) for p in (one, other)}
    assert len(texts) == 1


def paths_of(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Key paths of all fields of a Struct and of those inside it."""
    found = []
    for name in value.__struct_fields__:
        found.append((*prefix, name))
        if isinstance(inner := getattr(value, name), Struct):
            found += paths_of(inner, (*prefix, name))
    return found


PATHS = paths_of(MANIFEST)
# What later versions added, so that engines of before load; but a kind is always told.
MAY_BE_MISSING = {
    "parallel.kv_heads",
    "image.format.background",
    "prompt.in_order",
    "prompt.image_around",
    "decode.feature_layers",
    "decode.positions.trained_length",
    "decode.positions.attention_window",
    "decode.positions.inverse_frequencies",
}


def test_there_are_paths_to_test() -> None:
    assert len(PATHS) > 55
    assert {("prompt", "splice", "name"), ("image", "shortest_edge")} <= set(PATHS)


@pytest.mark.parametrize("path", [p for p in PATHS if p != ("schema_version",)], ids=".".join)
def test_every_key_is_needed_and_none_may_be_of_another_type(
    tmp_path: Path, path: tuple[str, ...]
) -> None:
    *above, name = path
    data = sample()
    table = data
    for key in above:
        table = table[key]
    value = table.pop(name)
    where = ".".join((MANIFEST_FILE, *above))
    if ".".join(path) in MAY_BE_MISSING:
        load_manifest(write(tmp_path, signed(data)))
    else:
        error = refusal(write(tmp_path, signed(data)))
        assert error.summary == f"{where} is not what this version of vlmforge reads."
        assert error.found == f"no key {name!r}"

    table[name] = value
    assert load_manifest(write(tmp_path, signed(data))) == MANIFEST
    table[name] = True if type(value) is not bool else 1  # JSON's true is no integer
    error = refusal(write(tmp_path, signed(data)))
    assert error.summary == f"{where}.{name} is not what this version of vlmforge reads."
    assert error.found == ("int 1" if type(value) is bool else "bool true")

    table[name] = value
    table["surplus"] = 1
    error = refusal(write(tmp_path, signed(data)))
    assert error.found == "unknown key 'surplus'"
    assert f"{where} is not" in error.summary


@pytest.mark.parametrize("version", [0, 4, "1", 1.0, True, None, [1]])
def test_another_schema_version_is_refused_before_anything_else(
    tmp_path: Path, version: object
) -> None:
    error = refusal(write(tmp_path, json.dumps({"schema_version": version, "unheard": "of"})))
    assert error.summary == f"{tmp_path / MANIFEST_FILE} is of another schema version."
    assert error.found == f"schema_version {version!r}"
    assert error.expected == "one of 1, 2, 3"
    assert error.fix.startswith("install the vlmforge that built it, or build it again")


@pytest.mark.parametrize("text", ["{}", "[]", "3", "null", '"schema_version"'])
def test_a_document_without_a_schema_version_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(write(tmp_path, text)).found == "schema_version None"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{'a': 1}", b"\xff\xfe\x00", dump_manifest(MANIFEST).encode()[:-3], b"[" * 200000],
    ids=["empty", "open", "quotes", "bytes", "cut", "deep"],
)
def test_what_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    error = refusal(tmp_path)
    assert error.summary == f"{tmp_path / MANIFEST_FILE} is not JSON."
    assert error.expected == "the manifest that build-engine wrote"
    assert error.fix == "copy the engine again, or rebuild it with build-engine"


def test_a_folder_without_a_manifest_is_no_engine(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        error = refusal(folder)
        assert error.summary == f"{folder} is not an engine directory."
        assert error.found == f"{folder / MANIFEST_FILE}: No such file or directory"
        assert error.fix == f"build-engine CHECKPOINT -o {folder}"


def test_a_file_or_a_nested_folder_is_no_engine(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    assert refusal(file).summary == f"{file} is not an engine directory."
    (tmp_path / MANIFEST_FILE).mkdir()
    assert refusal(tmp_path).summary == f"{tmp_path} is not an engine directory."


def test_parts_are_found_by_name() -> None:
    assert MANIFEST.part("decoder") is MANIFEST.parts[1]
    with pytest.raises(EngineFormatError) as caught:
        MANIFEST.part("audio")
    assert caught.value.summary == "The engine has no part 'audio'."
    assert caught.value.found == "vision, decoder"


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_bytes_of_a_token_in_the_cache(dtype: str, size: int) -> None:
    # The 7 B model's cache: 32 layers, 32 heads, 128 wide: half a megabyte a token in 16 bits.
    assert KVLayout(32, 32, 128, dtype, None).bytes_per_token == 32 * 32 * 128 * 2 * size


def test_a_checkpoint_is_no_engine(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    error = refusal(tmp_path)
    assert error.found == f"a checkpoint, without {MANIFEST_FILE}"
    assert error.fix == f"build-engine {tmp_path} -o ENGINE"
