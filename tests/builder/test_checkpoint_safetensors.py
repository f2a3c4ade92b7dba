"""Our reader of safetensors against the format's own library."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlmforge.errors import CheckpointError, TensorError, UnsupportedModelError
from vlmforge_builder.checkpoint.safetensors_file import read_safetensors

_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
)
_SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    data = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def _write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = (len(text) if length is None else length).to_bytes(8, "little")
    path.write_bytes(start + text + data)
    return path


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(_DTYPES), _SHAPES, st.integers(0, 99)),
    )
)
def test_reads_what_the_library_wrote(
    tmp_path_factory: pytest.TempPathFactory,
    described: dict[str, tuple[torch.dtype, tuple[int, ...], int]],
) -> None:
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    written = {name: _tensor(*what) for name, what in described.items()}
    save_file(written, path, metadata={"format": "pt"})
    tensors = read_safetensors(path)
    assert tensors.keys() == written.keys()
    for name, tensor in written.items():
        info, values = tensors[name].info, tensors[name].read()
        assert (info.name, info.shape, info.file) == (name, tuple(tensor.shape), path)
        assert f"torch.{info.dtype}" == str(tensor.dtype) == str(values.dtype)
        assert values.shape == tensor.shape
        assert values.is_contiguous()
        assert _bits(values) == _bits(tensor)


@given(pad=st.integers(0, 16))
def test_data_at_any_alignment(tmp_path_factory: pytest.TempPathFactory, pad: int) -> None:
    """Old writers did not pad the header."""
    text = json.dumps({"a": _entry("F32", [3], 0, 12)}).encode() + b" " * pad
    values = torch.tensor([1.5, -2.0, 3.0])
    path = _write(tmp_path_factory.mktemp("st") / "x.safetensors", text, _bits(values))
    assert torch.equal(read_safetensors(path)["a"].read(), values)


def test_writes_to_a_tensor_do_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    tensor = read_safetensors(path)["a"]
    values = tensor.read()
    values.zero_()
    assert path.read_bytes() == before
    assert torch.equal(tensor.read(), torch.ones(3))


_GOOD: dict[str, Any] = {
    "a": _entry("F32", [2, 2], 0, 16),
    "b": _entry("BF16", [0], 16, 16),
    "c": _entry("U8", [4], 16, 20),
}
_FIELD = st.sampled_from(["dtype", "shape", "data_offsets"])
_VALUE = (
    st.none()
    | st.booleans()
    | st.integers(-5, 40)
    | st.sampled_from(["F32", "BF16", "U8", "X", [2, 2], [4], [1 << 70], [True], [2, 2.0]])
    | st.lists(st.integers(-2, 24), max_size=3)
)


@given(st.lists(st.tuples(st.sampled_from("abc"), _FIELD, _VALUE), max_size=2), st.integers(-3, 3))
@example([("c", "data_offsets", [12, 16])], 0)  # overlap
@example([("c", "data_offsets", [17, 21])], 1)  # hole
@example([], -1)  # cut off
@example([], 1)  # more than the header says
def test_refuses_exactly_what_the_library_refuses(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[str, str, object]], extra: int
) -> None:
    header = {name: dict(entry) for name, entry in _GOOD.items()}
    for name, field, value in edits:
        header[name][field] = value
    path = _write(tmp_path_factory.mktemp("st") / "x.safetensors", header, bytes(20 + extra))
    try:
        with safe_open(path, "pt") as file:
            known = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_safetensors(path)
        return
    ours = {name: tensor.read() for name, tensor in read_safetensors(path).items()}
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in known.items()
    }


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_safetensors(path)
    _write(path, data)
    try:
        read_safetensors(path)
    except CheckpointError as error:
        assert error.found and error.expected and error.fix


@pytest.mark.parametrize(
    ("header", "data", "length", "error"),
    [
        (b"", b"", 200, "is cut off.|8 bytes|at least 208, to hold the header (in bytes)"),
        (_GOOD, bytes(7), None, "is cut off.|{size} bytes|{whole}, by its header (in bytes)"),
        (_GOOD, bytes(21), None, "not a valid safetensors file.|{size} bytes|{whole} bytes, by"),
        (b"{}", b"", 1 << 40, "not a valid|a header of 1099511627776 bytes|at most 100000000"),
        (b"{nope", b"", None, "not a valid|Expecting property name|a JSON object from"),
        (b"\xff\xff", b"", None, "not a valid|can't decode byte|a JSON object from"),
        (b"[" * 100_000, b"", None, "not a valid|recursion|a JSON object from"),
        (b"[]", b"", None, "not a valid|JSON of type list|a JSON object"),
        (b'{"a": 1, "a": 2}', b"", None, "not a valid|the name 'a' occurs twice|a JSON object"),
    ],
)
def test_words_about_a_damaged_file(
    tmp_path: Path, header: object, data: bytes, length: int | None, error: str
) -> None:
    path = _write(tmp_path / "m.safetensors", header, data, length=length)
    size = path.stat().st_size
    whole = size - len(data) + 20
    summary, found, expected = error.format(size=size, whole=whole).split("|")
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert caught.value.summary.startswith(f"{path} is")
    assert summary in caught.value.summary
    assert found in caught.value.found
    assert caught.value.expected.startswith(expected)
    assert caught.value.fix == "download m.safetensors again"


@pytest.mark.parametrize(
    ("entry", "found", "expected"),
    [
        (_entry("F5", [4], 16, 20), "dtype 'F5'", "one of BOOL, U8, "),
        (_entry("U8", [-4], 16, 20), "'shape': [-4]", "dtype, shape and data_offsets"),
        (_entry("U8", [4], 16, 19), "data_offsets [16, 19]", "4 bytes for uint8 (4,)"),
        (_entry("U8", [4], 12, 16), "its data begins at 12", "at 16: tensors follow each other"),
        (_entry("U8", [4], 18, 22), "its data begins at 18", "at 16: tensors follow each other"),
        ("text", "dtype None", "one of BOOL"),
    ],
)
def test_words_about_a_damaged_entry(
    tmp_path: Path, entry: object, found: str, expected: str
) -> None:
    path = _write(tmp_path / "m.safetensors", {**_GOOD, "c": entry}, bytes(20))
    with pytest.raises(TensorError) as caught:
        read_safetensors(path)
    assert caught.value.summary == f"The entry of tensor c in {path} is wrong."
    assert found in caught.value.found
    assert caught.value.expected.startswith(expected)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_numbers_of_less_than_a_byte_are_quantised(tmp_path: Path, dtype: str) -> None:
    text = json.dumps({"a.weight": _entry(dtype, [4], 0, 2)}).encode()
    path = _write(tmp_path / "x.safetensors", text, b"12")
    with pytest.raises(UnsupportedModelError, match="quantised already") as caught:
        read_safetensors(path)
    assert f"the tensor a.weight in {path} is of {dtype}" in caught.value.found


def test_file_that_shrinks_after_it_was_examined(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    tensor = read_safetensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(TensorError) as caught:
        tensor.read()
    assert caught.value.summary == f"The tensor a cannot be read from {path}."
    assert caught.value.expected.startswith("12 bytes at offset ")
    path.unlink()
    with pytest.raises(TensorError, match="cannot be read") as caught:
        tensor.read()
    assert "No such file" in caught.value.found
