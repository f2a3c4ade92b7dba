"""Our lazy reader of `torch.save` files against `torch.load`, and against hostile files."""

from __future__ import annotations

import collections
import io
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vlmforge.errors import CheckpointError, TensorError
from vlmforge_builder.checkpoint.torch_file import read_torch_file

_BASE = torch.arange(24, dtype=torch.float32)
_DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64)


def _save(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def _refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    assert str(path) in caught.value.summary
    return caught.value


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    values = {"a": _BASE, "b": torch.ones(3, dtype=torch.float16)}
    return _save(tmp_path_factory.mktemp("good") / "m.bin", values).read_bytes()


def test_views_strides_parameters_and_empty_tensors(tmp_path: Path) -> None:
    values = {
        "whole": _BASE,
        "shared": _BASE.view(4, 6),
        "transposed": _BASE.view(4, 6).t(),
        "slice": _BASE.view(2, 3, 4)[:, 1:, ::2],
        "expanded": _BASE[5:6].expand(3, 2),
        "scalar": _BASE[7],
        "empty": torch.empty(0, 4),
        "parameter": nn.Parameter(_BASE[3:5]),
        **{str(dtype): _BASE.to(dtype) for dtype in _DTYPES},
    }
    path = _save(tmp_path / "m.bin", collections.OrderedDict(values))
    tensors = read_torch_file(path)
    assert list(tensors) == list(values)
    for name, value in values.items():
        info, read = tensors[name].info, tensors[name].read()
        assert (info.name, info.shape, info.file) == (name, tuple(value.shape), path)
        assert f"torch.{info.dtype}" == str(value.dtype)
        assert read.dtype == value.dtype
        assert torch.equal(read, value.detach())


@given(
    st.permutations(range(3)),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2)), min_size=3, max_size=3),
)
def test_any_view(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: list[tuple[int, int]]
) -> None:
    view = _BASE.view(2, 3, 4).permute(order)
    view = view[
        tuple(
            slice(min(start, size - 1), None, step)
            for (start, step), size in zip(cuts, view.shape, strict=True)
        )
    ]
    path = _save(tmp_path_factory.mktemp("bin") / "m.bin", {"first": _BASE.clone(), "view": view})
    assert torch.equal(read_torch_file(path)["view"].read(), view)


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tensors = read_torch_file(_save(tmp_path / "m.bin", module.state_dict()))
    for name, value in module.state_dict().items():
        assert torch.equal(tensors[name].read(), value)


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def test_code_in_the_description_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "code-ran"
    path = _save(tmp_path / "m.bin", {"a": torch.ones(2), "b": _Touch(mark)})
    error = _refusal(path)
    assert not mark.exists()
    assert error.summary == f"{path} was refused: its description is damaged, or would run code."
    assert error.found == "a use of posix.mkdir"
    assert "safetensors" in error.fix
    torch.load(path, weights_only=False)
    assert mark.exists()  # so the file was what it seems


def test_code_in_a_legacy_file_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "code-ran"
    path = tmp_path / "m.bin"
    path.write_bytes(pickle.dumps({"a": _Touch(mark)}))
    assert "is not a zip archive of torch.save" in _refusal(path).summary
    assert not mark.exists()


def test_legacy_format_is_refused_and_the_conversion_works(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"a": _BASE}, path, _use_new_zipfile_serialization=False)
    error = _refusal(path)
    assert error.found.startswith("a bare pickle or something else")
    assert error.expected == "the zip format that torch.save writes since version 1.6"
    program = error.fix.partition('python -c "')[2].partition('"')[0]
    exec(program)
    assert torch.equal(read_torch_file(path)["a"].read(), _BASE)


def test_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert _refusal(path).found.startswith("a tar archive (10240 bytes")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.touch()
    assert "(0 bytes that begin with nothing)" in _refusal(path).found


@pytest.mark.parametrize(
    ("value", "found", "expected"),
    [
        ({"model": {"a": _BASE}}, "a dict under the name 'model'", "a flat dict from names"),
        ({"a": _BASE, "step": 3}, "a int under the name 'step'", "a flat dict from names"),
        ({"a": _BASE.to_sparse()}, "a Tensor under the name 'a'", "a flat dict from names"),
        ([_BASE], "a list", "a dict from names to tensors"),
        ({0: _BASE}, "a dict", "a dict from names to tensors"),
    ],
)
def test_anything_but_tensors_by_name(
    tmp_path: Path, value: object, found: str, expected: str
) -> None:
    error = _refusal(_save(tmp_path / "m.bin", value))
    assert found in error.found.replace("FakeTensor", "Tensor")
    assert error.expected.startswith(expected)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
        assert _refusal(path).found.startswith("m/code/__torch__/")


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert _refusal(path).fix == f"run 'git lfs pull' in {tmp_path}"


def _rewritten(data: bytes, path: Path, **changes: Any) -> Path:
    """The archive written again: other compression, or other or no records."""
    compression = changes.pop("compression", zipfile.ZIP_STORED)
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", compression) as new:
        for member in old.namelist():
            content = changes.get(member.rpartition("/")[2], old.read(member))
            if content is not None:
                new.writestr(member, content)
    return path


def test_archive_written_again_by_another_tool(tmp_path: Path, good: bytes) -> None:
    """torch computes offsets from how its own writer lays files out; we check them."""
    error = _refusal(_rewritten(good, tmp_path / "m.bin"))
    assert error.found == "no record there"
    unversioned = _rewritten(good, tmp_path / "n.bin", **{".format_version": None})
    assert torch.equal(read_torch_file(unversioned)["a"].read(), _BASE)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "m/data.pkl compressed"),
        ({"byteorder": b"big"}, "values in big-endian byte order"),
        ({"data.pkl": b"\x80\x02garbage"}, "UnpicklingError: Unsupported operand 103"),
        ({"data.pkl": b"\x80\x02cargparse\nNamespace\n."}, "a use of argparse.Namespace"),
        ({"data.pkl": b""}, "EOFError: "),
        ({"data.pkl": None}, "failed locating file data.pkl"),
    ],
)
def test_altered_archives(tmp_path: Path, good: bytes, changes: dict[str, Any], found: str) -> None:
    assert found in _refusal(_rewritten(good, tmp_path / "m.bin", **changes)).found


def test_record_that_is_too_short(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.bin"
    described = good.replace(b"K\x18\x85", b"K\x28\x85").replace(b"K\x18tq", b"K\x28tq")
    path.write_bytes(described)
    error = _refusal(path)
    assert isinstance(error, TensorError)
    assert error.summary == f"The values of tensor a are not all in {path}."
    assert error.found == "a record of 96 bytes"
    assert error.expected.startswith("160 bytes at offset ")


@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_off_anywhere(
    tmp_path_factory: pytest.TempPathFactory, good: bytes, share: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / "m.bin"
    path.write_bytes(good[: int(len(good) * share)])
    assert _refusal(path).fix


@given(st.data())
def test_damaged_anywhere(
    tmp_path_factory: pytest.TempPathFactory, good: bytes, data: st.DataObject
) -> None:
    """Read or refused with our error, whatever byte is wrong."""
    edits = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), min_size=1, max_size=3
        )
    )
    damaged = bytearray(good)
    for place, value in edits:
        damaged[place] = value
    path = tmp_path_factory.mktemp("damaged") / "m.bin"
    path.write_bytes(bytes(damaged))
    try:
        tensors = read_torch_file(path)
    except CheckpointError as error:
        assert str(path) in error.summary
        assert error.expected
        return
    for tensor in tensors.values():
        assert tuple(tensor.read().shape) == tensor.info.shape
