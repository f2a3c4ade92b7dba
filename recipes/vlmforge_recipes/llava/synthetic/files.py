"""Writes tensors into weight files, a block at a time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlmforge.errors import ConfigError
from vlmforge_recipes.llava.synthetic.spec import FileFormat, SyntheticSpec
from vlmforge_recipes.llava.synthetic.tensors import Entry

DTYPE_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
STEMS: dict[FileFormat, str] = {"safetensors": "model", "bin": "pytorch_model"}


@dataclass(slots=True)
class Progress:
    """One line on stderr every `every` seconds, so that quick writes are silent."""

    total: int
    every: float = 1.5
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)

    def add(self, nbytes: int) -> None:
        """Counts what was written."""
        self.done += nbytes
        now = time.monotonic()
        if now - self.said >= self.every:
            self.said = now
            share = f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB"
            print(f"synthetic: {share}, {now - self.started:.0f} s", file=sys.stderr, flush=True)


def write_weights(
    folder: Path, entries: Sequence[Entry], spec: SyntheticSpec, progress: Progress
) -> None:
    """Writes the shards, and their index if there are several, with the published file names.

    Raises:
        ConfigError: There are more shards than tensors.
    """
    shards, suffix = spec.shards, spec.file_format
    stem = STEMS[suffix]
    write = write_safetensors if suffix == "safetensors" else _write_bin
    weight_map: dict[str, str] = {}
    for number, part in enumerate(partition(entries, shards), start=1):
        middle = f"-{number:05d}-of-{shards:05d}" if shards > 1 else ""
        path = folder / f"{stem}{middle}.{suffix}"
        write(path, part, spec.seed, progress)
        weight_map |= {entry.name: path.name for entry in part}
    if shards > 1:
        total = sum(entry.nbytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.{suffix}.index.json").write_text(text)


def partition(entries: Sequence[Entry], shards: int) -> list[list[Entry]]:
    """Runs of about equal bytes, none of them empty."""
    if shards > len(entries):
        raise ConfigError(
            "There are more shards than tensors.",
            found=f"{shards} shards",
            expected=f"at most {len(entries)}",
        )
    share = sum(entry.nbytes for entry in entries) / shards
    parts: list[list[Entry]] = [[]]
    filled = 0
    for index, entry in enumerate(entries):
        must = shards - len(parts) == len(entries) - index
        if parts[-1] and len(parts) < shards and (must or filled >= share * len(parts)):
            parts.append([])
        parts[-1].append(entry)
        filled += entry.nbytes
    return parts


def write_safetensors(path: Path, entries: Sequence[Entry], seed: int, progress: Progress) -> None:
    """One file of these tensors, made block by block.

    The format's own rule: u64 length, JSON header padded to 8 bytes, then the raw tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPE_CODES[entry.dtype],
            "shape": list(entry.source.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for block in entry.blocks(seed):
                file.write(block.view(torch.uint8).numpy().data)
                progress.add(block.nbytes)


def _write_bin(path: Path, entries: Sequence[Entry], seed: int, progress: Progress) -> None:
    tensors = {
        entry.name: torch.cat(list(entry.blocks(seed))).reshape(entry.source.shape)
        for entry in entries
    }
    torch.save(tensors, path)
    progress.add(sum(entry.nbytes for entry in entries))
