"""The tensors of a checkpoint folder, by name and read lazily."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from vlmforge.errors import CheckpointError, TensorError
from vlmforge_builder.checkpoint.config import read_json
from vlmforge_builder.checkpoint.mapped import MappedTensor, TensorInfo
from vlmforge_builder.checkpoint.safetensors_file import read_safetensors
from vlmforge_builder.checkpoint.torch_file import read_torch_file

__all__ = [
    "TensorInfo",
    "TensorStore",
    "FileStore",
    "RenamedStore",
    "JoinedStore",
    "open_store",
    "expect",
]

_KINDS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".safetensors", ".bin")


class TensorStore(Protocol):
    """Tensors by name. `info` and `read` raise TensorError where there is none of that name."""

    def names(self) -> tuple[str, ...]:
        """Every name, in the order of the files."""

    def info(self, name: str) -> TensorInfo:
        """What is known without the values."""

    def read(self, name: str) -> Tensor:
        """The values, on CPU, on pages of the file: see `MappedTensor.read`."""

    def __contains__(self, name: object) -> bool: ...


@dataclass(frozen=True, slots=True)
class FileStore(TensorStore):
    """Tensors that lie in files."""

    tensors: Mapping[str, MappedTensor]

    @override
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @override
    def info(self, name: str) -> TensorInfo:
        return self._tensor(name).info

    @override
    def read(self, name: str) -> Tensor:
        return self._tensor(name).read()

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def _tensor(self, name: str) -> MappedTensor:
        if name not in self.tensors:
            raise _missing(name, self.tensors)
        return self.tensors[name]


class RenamedStore(TensorStore):
    """A store under other names: `mapping` gives each tensor's new name, or None to hide it."""

    def __init__(self, store: TensorStore, mapping: Callable[[str], str | None]) -> None:
        self._store = store
        self._old: dict[str, str] = {}
        for old in store.names():
            new = mapping(old)
            if new is not None and self._old.setdefault(new, old) != old:
                raise TensorError(
                    f"Two tensors would have the name {new}.",
                    found=f"{self._old[new]} and {old}",
                    expected="one of them",
                    fix="check that config.json belongs to these weight files",
                )

    @override
    def names(self) -> tuple[str, ...]:
        return tuple(self._old)

    @override
    def info(self, name: str) -> TensorInfo:
        return dataclasses.replace(self._store.info(self._former(name)), name=name)

    @override
    def read(self, name: str) -> Tensor:
        return self._store.read(self._former(name))

    def __contains__(self, name: object) -> bool:
        return name in self._old

    def _former(self, name: str) -> str:
        if name not in self._old:
            raise _missing(name, self._old)
        return self._old[name]


@dataclass(frozen=True, slots=True)
class JoinedStore(TensorStore):
    """Several stores as one; where a name occurs in more than one, the first wins."""

    stores: tuple[TensorStore, ...]

    @override
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for store in self.stores for name in store.names()))

    @override
    def info(self, name: str) -> TensorInfo:
        return self._holder(name).info(name)

    @override
    def read(self, name: str) -> Tensor:
        return self._holder(name).read(name)

    def __contains__(self, name: object) -> bool:
        return any(name in store for store in self.stores)

    def _holder(self, name: str) -> TensorStore:
        for store in self.stores:
            if name in store:
                return store
        raise _missing(name, self.names())


def expect(store: TensorStore, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """The tensor's info, if its shape is the expected one.

    Raises:
        TensorError: another shape, or no such tensor (names the closest ones).
    """
    info = store.info(name)
    if info.shape != shape:
        raise TensorError(
            f"The tensor {name} in {info.file} has another shape than config.json says.",
            found=str(info.shape),
            expected=str(shape),
            fix="check that config.json belongs to these weight files",
        )
    return info


def _missing(name: str, names: Iterable[str]) -> TensorError:
    known = list(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    found = "similar names: " + ", ".join(close) if close else "no similar name"
    return TensorError(
        f"The checkpoint has no tensor {name}.",
        found=f"{found} (among {len(known)} tensors)",
        expected=name,
        fix="check that config.json belongs to these weight files, or download them again",
    )


def open_store(folder: Path, note: Callable[[str], None] = lambda text: None) -> TensorStore:
    """The tensors of a folder; headers are read and checked, values are not.

    Taken is the first of these that exists: `model.safetensors`, `model.safetensors.index.json`,
    `pytorch_model.bin`, `pytorch_model.bin.index.json` (the order of `from_pretrained` of
    transformers), every `*.safetensors`. An index decides which shard a tensor is read from,
    whatever else the shards repeat.

    Args:
        folder: Where the files are.
        note: Gets a warning where there are other weights beside those that are taken.

    Raises:
        CheckpointError: no weights (says what is there instead), a missing shard, a file that is
            cut off, damaged, a Git LFS pointer, or would run code; files without an index that
            hold one tensor with several values.
    """
    kinds = [folder / name for name in _KINDS if (folder / name).exists()]
    if not kinds:
        return FileStore(_read_unindexed(folder))
    taken, others = kinds[0], [path.name for path in kinds[1:]]
    if others:
        note(
            f"warning: {folder} holds weights more than once: {taken.name} is used, as "
            f"transformers does; {', '.join(others)} and what it names are left out"
        )
    return FileStore(_read_index(taken) if taken.suffix == ".json" else _read_file(taken))


def _read_unindexed(folder: Path) -> dict[str, MappedTensor]:
    paths = sorted(folder.glob("*.safetensors"))
    # The same weights again, by the names of the code that trained them.
    paths = [path for path in paths if not path.name.startswith("consolidated")] or paths
    tensors: dict[str, MappedTensor] = {}
    for path in paths:
        for name, tensor in _read_file(path).items():
            if not _equal(tensors.setdefault(name, tensor), tensor):
                raise TensorError(
                    f"{folder} holds the tensor {name} with two values, and no index.",
                    found=f"{tensors[name].info.file.name} and {path.name}",
                    expected="model.safetensors, or an index that says which file it is in",
                    fix="remove the files that do not belong to the checkpoint",
                )
    if not tensors:
        raise _no_weights(folder)
    return tensors


def _equal(first: MappedTensor, second: MappedTensor) -> bool:
    same = (first.info.dtype, first.info.shape) == (second.info.dtype, second.info.shape)
    return first is second or (same and torch.equal(first.read(), second.read()))


def _read_file(path: Path) -> dict[str, MappedTensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)


def _read_index(index: Path) -> dict[str, MappedTensor]:
    placed = _weight_map(index)
    paths = {shard: index.parent / shard for shard in sorted(set(placed.values()))}
    if absent := [shard for shard, path in paths.items() if not path.is_file()]:
        raise CheckpointError(
            f"{index.parent} lacks {len(absent)} of the {len(paths)} weight files.",
            found="no " + ", ".join(absent),
            expected=f"every file that {index.name} names",
            fix="download the missing files again",
        )
    shards = {shard: _read_file(path) for shard, path in paths.items()}
    for name, shard in placed.items():
        if name not in shards[shard]:
            raise TensorError(
                f"The tensor {name} is not in {index.parent / shard}.",
                found=f"{len(shards[shard])} other tensors",
                expected=f"{name}, by {index.name}",
                fix=f"download {shard} and {index.name} again",
            )
    return {name: shards[shard][name] for name, shard in placed.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Shard by name of tensor; shards are plain file names."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise _bad_index(index, "no weight_map", "a weight_map from tensors to files")
    for name, shard in entries.items():
        plain = isinstance(shard, str) and shard == Path(shard).name
        if not plain or Path(shard).suffix not in _SUFFIXES:
            found = f"{shard!r} for {name}"
            raise _bad_index(index, found, "names of .safetensors or .bin files beside the index")
    return entries


def _bad_index(index: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{index} is not a valid index of weights.",
        found=found,
        expected=expected,
        fix=f"download {index.name} again",
    )


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return CheckpointError(
        f"{folder} has no weights.",
        found=shown or ("an empty folder" if folder.is_dir() else "no such folder"),
        expected="model.safetensors or pytorch_model.bin, or their shards with an index",
        fix="download the weight files too, or point to the folder that has them; an adapter or a "
        "projector alone (mm_projector.bin) is not a model: merge it into its own first",
    )
