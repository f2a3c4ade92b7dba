"""The tensors of a `.bin` file of `torch.save`, found without running code or reading values.

The file is a zip archive: `data.pkl` describes the tensors, `data/*` holds their values
(https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmforge.errors import CheckpointError, TensorError
from vlmforge_builder.checkpoint.config import refuse_pointer
from vlmforge_builder.checkpoint.mapped import MappedTensor, TensorInfo

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ADVICE = ("Weights only load failed", "Check the documentation")
# What a damaged directory of the archive makes zipfile raise.
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error)
# What a damaged description makes the restricted unpickler raise.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def read_torch_file(path: Path) -> dict[str, MappedTensor]:
    """The tensors of a file by name; only the archive's directory and description are read.

    Raises:
        CheckpointError: not a zip archive of `torch.save`, cut off, its description would run
            code, or it holds anything but tensors by name.
    """
    refuse_pointer(path)
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            raise _not_an_archive(path)
    records = _records(path)
    return {name: _tensor(path, name, value, records) for name, value in _describe(path).items()}


def _records(path: Path) -> dict[int, int]:
    """Size by offset of every file in the archive; torch.save compresses none."""
    records = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise _damaged(path, f"{member.filename} compressed", "nothing compressed")
                if member.filename.endswith("/byteorder") and archive.read(member) != b"little":
                    raise _damaged(path, "values in big-endian byte order", "little-endian values")
                file.seek(member.header_offset)
                magic, name_size, extra_size = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                if magic != _ZIP_MAGIC:
                    raise _damaged(path, f"no {member.filename} at its place", "a whole archive")
                records[file.tell() + name_size + extra_size] = member.file_size
    except _ZIP_ERRORS as error:
        raise _damaged(path, str(error), "a whole zip archive") from error
    return records


def _describe(path: Path) -> Mapping[str, object]:
    try:
        # Under fake tensors no value is read, and storages know their offset in the file.
        with FakeTensorMode():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING_ERRORS as error:
        raise _refused(path, error) from error
    if isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded):
        return loaded
    raise _damaged(path, f"a {type(loaded).__name__}", "a dict from names to tensors")


def _tensor(path: Path, name: str, value: object, records: Mapping[int, int]) -> MappedTensor:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise TensorError(
            f"{path} holds something else than a tensor.",
            found=f"a {type(value).__name__} under the name {name!r}",
            expected="a flat dict from names to dense tensors",
            fix="save the model's state_dict alone: torch.save(model.state_dict(), ...)",
        )
    # Documented in the notes on serialization; checked against the archive's own directory.
    start = value.untyped_storage()._checkpoint_offset or 0
    inside = int(value.storage_offset()) * value.element_size()
    info = TensorInfo(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), path)
    tensor = MappedTensor(info, start + inside, tuple(value.stride()))
    size = records.get(start)
    if tensor.span and (size is None or inside + tensor.span > size):
        raise TensorError(
            f"The values of tensor {name} are not all in {path}.",
            found="no record there" if size is None else f"a record of {size} bytes",
            expected=f"{inside + tensor.span} bytes at offset {start}",
            fix=f"download {path.name} again",
        )
    return tensor


def _not_an_archive(path: Path) -> CheckpointError:
    with path.open("rb") as file:
        start = file.read(512)
    kind = "a tar archive" if start[257:262] == b"ustar" else "a bare pickle or something else"
    size = path.stat().st_size
    return CheckpointError(
        f"{path} is not a zip archive of torch.save.",
        found=f"{kind} ({size} bytes that begin with {start[:8].hex(' ') or 'nothing'})",
        expected="the zip format that torch.save writes since version 1.6",
        fix="if it came from an older torch, convert it: python -c \"import torch; n = '"
        f"{path}'; torch.save(torch.load(n, map_location='cpu', weights_only=True), n)\"; "
        "otherwise download it again",
    )


def _refused(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} was refused: its description is damaged, or would run code.",
        found=_cause(error),
        expected="tensors and plain containers only",
        fix="use a safetensors version of the checkpoint, or download the file again from a "
        "source that you trust",
    )


def _cause(error: Exception) -> str:
    """What the unpickler met, without torch's advice to switch its protection off."""
    text = str(error)
    if name := re.search(r"GLOBAL (\S+)", text):
        return f"a use of {name[1]}"
    paragraphs = [part.strip() for part in text.split("\n\n") if not part.startswith(_ADVICE)]
    first = "".join(paragraphs[:1]).partition("\n")[0]
    return f"{type(error).__name__}: {first[:160]}"


def _damaged(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a valid weight file.",
        found=found,
        expected=expected,
        fix=f"download {path.name} again",
    )
