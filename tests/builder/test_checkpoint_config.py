from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.config import ConfigReader, read_config, read_json

_FILE = Path("model") / "config.json"
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def _reader(**values: object) -> ConfigReader:
    return ConfigReader(values, _FILE)


def _write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "found", "expected"),
    [
        (b'{\n  "a": 1,\n  b\n}', "line 3 column 3", "JSON"),
        (b"", "line 1 column 1", "JSON"),
        (b'{"a": 1} x', "Extra data at line 1 column 10", "JSON"),
        (b'{"a": "\xff"}', "a byte at offset 7 that is not UTF-8", "JSON"),
        (b"[" * 100_000, "values nested too deeply", "JSON"),
        (b"[1, 2]", "a list of 2 at the top", "a JSON object at the top"),
        (b"null", "nothing at the top", "a JSON object at the top"),
    ],
)
def test_files_that_are_not_json_objects(
    tmp_path: Path, data: bytes, found: str, expected: str
) -> None:
    path = _write(tmp_path, data)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert caught.value.summary == f"{path} is not a valid configuration file."
    assert found in caught.value.found
    assert caught.value.expected == expected
    assert caught.value.fix == "download config.json again"


def test_missing_file_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json does not exist\.") as caught:
        read_json(tmp_path / "config.json")
    assert caught.value.found == f"a folder without it: {tmp_path}"
    assert caught.value.expected == "a file named config.json"
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "no" / "config.json")
    assert caught.value.found == f"no folder {tmp_path / 'no'}"


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read\.") as caught:
        read_json(tmp_path)
    assert caught.value.found == "Is a directory"


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = _write(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert caught.value.summary == f"{path} is a Git LFS pointer, not the file itself."
    assert caught.value.fix == f"run 'git lfs pull' in {tmp_path}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


@given(st.dictionaries(st.text(), _JSON))
def test_objects_are_read_whole(folder: Path, value: Any) -> None:
    path = _write(folder, json.dumps(value).encode())
    assert read_json(path) == value
    assert read_config(path) == ConfigReader(value, path)


def test_values_of_the_right_type() -> None:
    reader = _reader(i=3, f=0.5, s="x", b=False, o={"inner": {"depth": 7}})
    assert (reader.int("i"), reader.float("f"), reader.str("s"), reader.bool("b")) == (
        *(3, 0.5, "x", False),
    )
    assert reader.float("i") == 3.0
    assert isinstance(reader.float("i"), float)
    assert reader.section("o").section("inner").int("depth") == 7
    assert reader.get("o") == {"inner": {"depth": 7}}


@pytest.mark.parametrize("values", [{}, {"k": None}])
def test_absent_and_null_are_alike(values: dict[str, object]) -> None:
    reader = _reader(**values)
    assert not reader.has("k")
    assert reader.str("k", "") == ""
    assert reader.bool("k", default=False) is False
    assert reader.opt_int("k") is reader.opt_float("k") is reader.opt_str("k") is None
    assert reader.opt_bool("k") is reader.get("k") is None


def test_a_number_with_a_default_is_not_null() -> None:
    assert (_reader().int("k", 0), _reader().float("k", 0.5)) == (0, 0.5)
    for getter in ("int", "float"):
        with pytest.raises(CheckpointError, match=r"lacks k\."):
            getattr(_reader(k=None), getter)("k", 1)


@pytest.mark.parametrize("getter", ["int", "opt_int"])
def test_whole_numbers_have_ranges(getter: str) -> None:
    def get(value: int, within: range) -> int:
        found: int = getattr(_reader(k=value), getter)("k", within=within)
        return found

    assert [get(value, range(1, 9)) for value in (1, 8)] == [1, 8]
    for value in (0, 9, -1, 10**9, 10**15, 2**63, 10**400):
        with pytest.raises(CheckpointError, match=r"has a wrong k\.") as caught:
            get(value, range(1, 9))
        assert caught.value.expected == "a whole number from 1 to 8"
    with pytest.raises(CheckpointError) as caught:
        get(5, range(2, 9, 2))
    assert caught.value.expected == "an even number from 2 to 8"
    for value in (2**63, -(2**63) - 1):  # without a range: what 64 bits hold
        with pytest.raises(CheckpointError):
            getattr(_reader(k=value), getter)("k")


@pytest.mark.parametrize("getter", ["float", "opt_float"])
def test_other_numbers_have_spans(getter: str) -> None:
    def get(value: float) -> float:
        found: float = getattr(_reader(k=value), getter)("k", within=(0.0, 1.0))
        return found

    assert [get(value) for value in (0, 0.0, 0.5, 1)] == [0.0, 0.0, 0.5, 1.0]
    for value in (-1e-9, 1.5, 10**9, 2**63):
        with pytest.raises(CheckpointError, match=r"has a wrong k\.") as caught:
            get(value)
        assert caught.value.expected == "a number from 0 to 1"
    for value in (float("nan"), float("-inf"), 10**400):
        with pytest.raises(CheckpointError) as caught:
            get(value)
        assert caught.value.expected == "a finite number"


def test_a_number_of_thousands_of_digits(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a valid configuration") as caught:
        read_json(_write(tmp_path, b'{"a": ' + b"9" * 5000 + b"}"))
    assert caught.value.found == "a number of thousands of digits"


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "section": "an object",
}


@pytest.mark.parametrize(("getter", "expected"), _EXPECTED.items())
def test_missing_key(getter: str, expected: str) -> None:
    reader = _reader(text={"rope": {}}).section("text").section("rope")
    with pytest.raises(CheckpointError) as caught:
        getattr(reader, getter)("theta")
    assert str(caught.value).splitlines() == [
        "model/config.json lacks text.rope.theta.",
        "  found:    nothing",
        f"  expected: {expected}",
        "  fix:      check config.json against the published one",
    ]


@pytest.mark.parametrize(
    ("getter", "value", "found"),
    [
        ("int", True, "true"),
        ("int", 1.0, "1.0"),
        ("int", "12", '"12"'),
        ("float", False, "false"),
        ("float", float("inf"), "Infinity"),
        ("float", float("nan"), "NaN"),
        ("float", 10**400, "1000"),
        ("float", [0.5], "a list of 1"),
        ("str", 3, "3"),
        ("bool", 0, "0"),
        ("bool", "true", '"true"'),
        ("section", [1, 2], "a list of 2"),
        ("str", {"a": 1}, "an object of 1 keys"),
    ],
)
def test_wrong_type(getter: str, value: object, found: str) -> None:
    for name in (getter, f"opt_{getter}") if getter != "section" else (getter,):
        with pytest.raises(CheckpointError) as caught:
            getattr(_reader(a=value), name)("a")
        assert caught.value.summary == "model/config.json has a wrong a."
        assert caught.value.found.startswith(found)
        assert caught.value.expected in (*_EXPECTED.values(), "a finite number")
        assert len(caught.value.found) <= 80


@given(_JSON, st.sampled_from(["int", "float", "str", "bool"]))
def test_getters_return_their_type_or_refuse(value: object, getter: str) -> None:
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool}[getter]
    fits = isinstance(value, kinds) and (getter == "bool") == isinstance(value, bool)
    fits = fits and value not in (float("inf"), float("-inf"))
    fits = fits and (getter != "int" or -(2**63) <= value < 2**63)
    reader = _reader(k=value)
    if fits:
        assert getattr(reader, getter)("k") == value
    else:
        with pytest.raises(CheckpointError, match=r"model/config\.json (lacks|has a wrong) k\."):
            getattr(reader, getter)("k")
