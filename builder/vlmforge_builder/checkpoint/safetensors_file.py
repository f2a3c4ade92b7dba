"""The header of a safetensors file (https://huggingface.co/docs/safetensors), checked.

The format: 8 bytes little-endian length of the header, the header (a JSON object from tensor names
to dtype, shape and [begin, end) in the data), and the data without holes or overlaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from vlmforge.errors import CheckpointError, TensorError
from vlmforge_builder.checkpoint.altered import quantised
from vlmforge_builder.checkpoint.config import refuse_pointer
from vlmforge_builder.checkpoint.mapped import (
    MappedTensor,
    TensorInfo,
    contiguous_stride,
    torch_dtype,
)

_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000
_DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
# Less than a byte a number: of quantised weights only.
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")


def read_safetensors(path: Path) -> dict[str, MappedTensor]:
    """The tensors of a file by name; only its header is read.

    Raises:
        CheckpointError: the file is cut off, or its header is not of the format; a TensorError
            where one tensor's entry is wrong; an UnsupportedModelError where it is quantised.
    """
    refuse_pointer(path)
    header, data_start = _read_header(path)
    tensors = {
        name: _tensor(path, name, entry, data_start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_layout(path, tensors, data_start)
    return tensors


def _read_header(path: Path) -> tuple[dict[str, object], int]:
    """The header, and where the data begins."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if len(start) < _LENGTH_BYTES:
            raise _truncated(path, size, "at least 8 bytes")
        if length > _MAX_HEADER:
            raise _bad_header(path, f"a header of {length} bytes", f"at most {_MAX_HEADER} bytes")
        if _LENGTH_BYTES + length > size:
            raise _truncated(path, size, f"at least {_LENGTH_BYTES + length}, to hold the header")
        text = file.read(length)
    return _parse(path, text), _LENGTH_BYTES + length


def _parse(path: Path, text: bytes) -> dict[str, object]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        found = str(error) or type(error).__name__
        raise _bad_header(path, found, "a JSON object from tensor names to entries") from error
    if not isinstance(header, dict):
        raise _bad_header(path, f"JSON of type {type(header).__name__}", "a JSON object")
    return header


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return values


def _tensor(path: Path, name: str, entry: object, data_start: int) -> MappedTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype = _dtype(path, name, fields.get("dtype"))
    shape, offsets = _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise _bad_entry(path, name, repr(entry)[:120], "dtype, shape and data_offsets")
    begin, end = offsets
    size = math.prod(shape) * torch_dtype(dtype).itemsize
    if end - begin != size:
        raise _bad_entry(
            path, name, f"data_offsets [{begin}, {end}]", f"{size} bytes for {dtype} {shape}"
        )
    info = TensorInfo(name, dtype, shape, path)
    return MappedTensor(info, data_start + begin, contiguous_stride(shape))


def _dtype(path: Path, name: str, stored: object) -> str:
    if isinstance(stored, str) and stored in _DTYPES:
        return _DTYPES[stored]
    if stored in _PACKED:
        raise quantised(f"the tensor {name} in {path} is of {stored}", None)
    raise _bad_entry(path, name, f"dtype {stored!r}", "one of " + ", ".join(_DTYPES))


def _counts(value: object) -> tuple[int, ...] | None:
    """The value if it is a list of sizes."""
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        return tuple(value)
    return None


def _check_layout(path: Path, tensors: Mapping[str, MappedTensor], data_start: int) -> None:
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda item: (item.offset, item.span)):
        if tensor.offset != position:
            begin, expected = tensor.offset - data_start, position - data_start
            raise _bad_entry(
                path,
                tensor.info.name,
                f"its data begins at {begin}",
                f"at {expected}: tensors follow each other without holes or overlaps",
            )
        position += tensor.span
    size = path.stat().st_size
    if size < position:
        raise _truncated(path, size, f"{position}, by its header")
    if size > position:
        raise _bad_header(path, f"{size} bytes", f"{position} bytes, by its header")


def _truncated(path: Path, size: int, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is cut off.",
        found=f"{size} bytes",
        expected=f"{expected} (in bytes)",
        fix=f"download {path.name} again",
    )


def _bad_header(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a valid safetensors file.",
        found=found,
        expected=expected,
        fix=f"download {path.name} again",
    )


def _bad_entry(path: Path, name: str, found: str, expected: str) -> TensorError:
    return TensorError(
        f"The entry of tensor {name} in {path} is wrong.",
        found=found,
        expected=expected,
        fix=f"download {path.name} again",
    )
