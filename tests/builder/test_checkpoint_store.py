from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import HF, ORIGINAL
from vlmforge.errors import CheckpointError, TensorError
from vlmforge_builder.checkpoint.store import (
    JoinedStore,
    RenamedStore,
    TensorInfo,
    TensorStore,
    expect,
    open_store,
)

_A, _B = torch.arange(6.0).view(2, 3), torch.tensor([1, 2], dtype=torch.bfloat16)
_SUFFIXES = ("safetensors", "bin")
_STEMS = {"safetensors": "model", "bin": "pytorch_model"}


def _save(path: Path, **tensors: torch.Tensor) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def _index(folder: Path, suffix: str, weight_map: object) -> Path:
    path = folder / f"{_STEMS[suffix]}.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def _sharded(folder: Path, suffix: str) -> dict[str, str]:
    """Two shards; returns the shard of each tensor, as the index says it."""
    shards = [f"{_STEMS[suffix]}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    _save(folder / shards[0], a=_A)
    _save(folder / shards[1], a=-_A, b=_B, unlisted=_B + 1)
    weight_map = {"b": shards[1], "a": shards[0]}
    _index(folder, suffix, weight_map)
    return weight_map


def _refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_store(folder)
    return caught.value


def _values(store: TensorStore) -> dict[str, list[float]]:
    return {name: store.read(name).flatten().tolist() for name in store.names()}


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_one_file(tmp_path: Path, suffix: str) -> None:
    path = _save(tmp_path / f"{_STEMS[suffix]}.{suffix}", a=_A, b=_B)
    store = open_store(tmp_path)
    assert sorted(store.names()) == ["a", "b"]
    assert store.info("b") == TensorInfo("b", "bfloat16", (2,), path)
    assert torch.equal(store.read("a"), _A)
    assert torch.equal(store.read("b"), _B)
    assert "a" in store
    assert "c" not in store


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_index_decides_which_shard_wins(tmp_path: Path, suffix: str) -> None:
    weight_map = _sharded(tmp_path, suffix)
    store = open_store(tmp_path)
    assert store.names() == ("b", "a")  # and not `unlisted`
    assert {name: store.info(name).file.name for name in store.names()} == weight_map
    assert torch.equal(store.read("a"), _A)


def test_first_kind_of_weights_wins_and_the_others_are_told(tmp_path: Path) -> None:
    """The order is that of transformers (see `test_weights_as_transformers.py`)."""
    order = (
        "other.safetensors",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "model.safetensors",
    )
    for value, name in enumerate(order):
        if name.endswith(".json"):
            kind = name.split(".")[1]
            shard = _save(tmp_path / f"shard.{kind}", x=torch.tensor([float(value)]))
            _index(tmp_path, kind, {"x": shard.name})
        else:
            _save(tmp_path / name, x=torch.tensor([float(value)]))
        # "shard.safetensors" sorts behind "other.safetensors".
        notes: list[str] = []
        assert _values(open_store(tmp_path, notes.append)) == {"x": [value]}
        left_out = order[1:value][::-1]
        if left_out:
            (note,) = notes
            assert note.startswith(f"warning: {tmp_path} holds weights more than once: {name} is")
            assert f"; {', '.join(left_out)} and" in note
        else:
            assert notes == []


def test_files_without_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path / "b.safetensors", x=_A, y=_B)
    _save(tmp_path / "a.safetensors", x=_A)
    _save(tmp_path / "consolidated.safetensors", x=-_A)
    _save(tmp_path / "training.bin", z=_B)
    store = open_store(tmp_path)
    assert store.names() == ("x", "y")
    assert store.info("x").file.name == "a.safetensors"
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").unlink()
    assert torch.equal(open_store(tmp_path).read("x"), -_A)


@pytest.mark.parametrize(
    "other", [-_A, _A.bfloat16(), _A.flatten()], ids=["sign", "dtype", "shape"]
)
def test_two_values_of_a_tensor_without_an_index_are_refused(
    tmp_path: Path, other: torch.Tensor
) -> None:
    _save(tmp_path / "a.safetensors", x=_A)
    _save(tmp_path / "b.safetensors", x=other)
    error = _refusal(tmp_path)
    assert isinstance(error, TensorError)
    assert error.summary == f"{tmp_path} holds the tensor x with two values, and no index."
    assert error.found == "a.safetensors and b.safetensors"


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_missing_shards_are_named(tmp_path: Path, suffix: str) -> None:
    first, second = sorted(_sharded(tmp_path, suffix).values())
    (tmp_path / second).unlink()
    error = _refusal(tmp_path)
    assert error.summary == f"{tmp_path} lacks 1 of the 2 weight files."
    assert error.found == f"no {second}"
    assert error.fix == "download the missing files again"
    (tmp_path / first).unlink()
    assert _refusal(tmp_path).found == f"no {first}, {second}"


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_tensor_that_only_the_index_knows(tmp_path: Path, suffix: str) -> None:
    weight_map = _sharded(tmp_path, suffix)
    index = _index(tmp_path, suffix, weight_map | {"c": weight_map["b"]})
    error = _refusal(tmp_path)
    assert isinstance(error, TensorError)
    assert error.summary == f"The tensor c is not in {tmp_path / weight_map['b']}."
    assert error.found == "3 other tensors"
    assert error.expected == f"c, by {index.name}"


@pytest.mark.parametrize(
    ("weight_map", "found"),
    [
        ({}, "no weight_map"),
        (["a"], "no weight_map"),
        ({"a": 3}, "3 for a"),
        ({"a": "../model.safetensors"}, "'../model.safetensors' for a"),
        ({"a": "/model.safetensors"}, "'/model.safetensors' for a"),
        ({"a": "model.pt"}, "'model.pt' for a"),
        ({"a": ""}, "'' for a"),
    ],
)
def test_bad_index(tmp_path: Path, weight_map: object, found: str) -> None:
    index = _index(tmp_path, "safetensors", weight_map)
    error = _refusal(tmp_path)
    assert error.summary == f"{index} is not a valid index of weights."
    assert error.found == found


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_damaged_shard_is_named(tmp_path: Path, suffix: str) -> None:
    shard = tmp_path / _sharded(tmp_path, suffix)["b"]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert str(shard) in _refusal(tmp_path).summary
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert _refusal(tmp_path).fix == f"run 'git lfs pull' in {tmp_path}"


def test_folder_without_weights_lists_what_it_has(tmp_path: Path) -> None:
    assert _refusal(tmp_path).found == "an empty folder"
    assert _refusal(tmp_path / "no").found == "no such folder"
    (tmp_path / "config.json").touch()
    (tmp_path / "consolidated.pth").touch()
    error = _refusal(tmp_path)
    assert error.summary == f"{tmp_path} has no weights."
    assert error.found == "config.json, consolidated.pth"
    assert error.expected.startswith("model.safetensors or pytorch_model.bin")
    for number in range(30):
        (tmp_path / f"{number}.txt").touch()
    assert _refusal(tmp_path).found.endswith(", ... (32 in all)")


@pytest.mark.parametrize("folder", [HF / "checkpoint", ORIGINAL / "checkpoint"])
def test_published_layouts_against_the_formats_own_libraries(folder: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        bin_file = path.suffix == ".bin"
        expected |= torch.load(path, weights_only=True) if bin_file else load_file(path)
    store = open_store(folder)
    assert set(store.names()) == set(expected)
    for name, value in expected.items():
        assert f"torch.{expect(store, name, tuple(value.shape)).dtype}" == str(value.dtype)
        assert torch.equal(store.read(name), value)


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    _save(tmp_path / "model.safetensors", **{"layers.0.weight": _A, "layers.1.weight": -_A})
    return open_store(tmp_path)


def test_expect(store: TensorStore, tmp_path: Path) -> None:
    assert expect(store, "layers.0.weight", (2, 3)) == store.info("layers.0.weight")
    with pytest.raises(TensorError) as caught:
        expect(store, "layers.0.weight", (3, 2))
    assert "layers.0.weight" in caught.value.summary
    assert str(tmp_path / "model.safetensors") in caught.value.summary
    assert (caught.value.found, caught.value.expected) == ("(2, 3)", "(3, 2)")
    assert caught.value.fix == "check that config.json belongs to these weight files"


def test_missing_tensor_names_the_closest(store: TensorStore) -> None:
    joined, renamed = JoinedStore((store,)), RenamedStore(store, lambda name: name)
    for any_store in (store, joined, renamed):
        with pytest.raises(TensorError) as caught:
            expect(any_store, "layer.0.weight", (2, 3))
        assert caught.value.summary == "The checkpoint has no tensor layer.0.weight."
        assert caught.value.found == (
            "similar names: layers.0.weight, layers.1.weight (among 2 tensors)"
        )
        with pytest.raises(TensorError, match="has no tensor") as caught:
            any_store.read("zzz")
        assert caught.value.found == "no similar name (among 2 tensors)"


def test_renamed_store(store: TensorStore) -> None:
    names: Mapping[str, str] = {"layers.1.weight": "last"}
    renamed = RenamedStore(store, names.get)
    assert renamed.names() == ("last",)
    assert "last" in renamed
    assert "layers.1.weight" not in renamed
    assert "layers.0.weight" not in renamed
    assert renamed.info("last").name == "last"
    assert expect(renamed, "last", (2, 3)).file == store.info("layers.1.weight").file
    assert torch.equal(renamed.read("last"), -_A)


def test_renaming_two_tensors_to_one_is_refused(store: TensorStore) -> None:
    with pytest.raises(TensorError, match="Two tensors would have the name x") as caught:
        RenamedStore(store, lambda _: "x")
    assert caught.value.found == "layers.0.weight and layers.1.weight"


def test_joined_store(store: TensorStore) -> None:
    other = RenamedStore(
        store, lambda name: {"layers.1.weight": "layers.0.weight"}.get(name, "own")
    )
    joined = JoinedStore((store, other))
    assert joined.names() == ("layers.0.weight", "layers.1.weight", "own")
    assert torch.equal(joined.read("layers.0.weight"), _A)
    assert torch.equal(JoinedStore((other, store)).read("layers.0.weight"), -_A)
    assert torch.equal(joined.read("own"), _A)
    assert "own" in joined
    assert "none" not in joined


_MEASURE = """
import sys
from pathlib import Path
import torch
from vlmforge_builder.checkpoint.store import open_store

def memory():
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {row.split(":")[0]: int(row.split()[1]) / 1024 for row in rows}
    return sizes["Rss"], sizes["Anonymous"]

for folder in sys.argv[1:]:
    store = open_store(Path(folder))
    torch.ones(1 << 20).sum(), store.read(store.names()[0])
    rss, anonymous = memory()
    for name in store.names():
        tensor = store.read(name)
        assert tensor.sum() == tensor.numel()
        _, held = memory()
        assert held - anonymous < 8, f"{held - anonymous} MiB of {folder} copied"
        del tensor
        after, _ = memory()
        assert after - rss < 8, f"{after - rss} MiB of {folder} kept"
    print(len(store.names()))
"""


def test_reading_copies_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    megabytes_16 = torch.ones(4 << 20)
    tensors = {f"t{i}": megabytes_16.clone() for i in range(3)}
    for suffix in _SUFFIXES:
        (tmp_path / suffix).mkdir()
        _save(tmp_path / suffix / f"{_STEMS[suffix]}.{suffix}", **tensors)
    command = [sys.executable, "-c", _MEASURE, *(str(tmp_path / suffix) for suffix in _SUFFIXES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "3\n" * len(_SUFFIXES), done.stderr
