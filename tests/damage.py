"""Ways to damage a checkpoint, an engine or an image."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file

from vlmforge.engine.manifest import MANIFEST_FILE, manifest_digest

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
BINS = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
NORM = "language_model.model.norm.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"

Damage = Callable[[Path], object]


def edit_json(name: str, **values: Any) -> Damage:
    """Set keys of a JSON file ("a.b" is nested); the value `...` removes the key."""

    def damage(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text("utf-8"))
        for dotted, value in values.items():
            *outer, key = dotted.split(".")
            table = data
            for part in outer:
                table = table[part]
            if value is ...:
                del table[key]
            else:
                table[key] = value
        if name == MANIFEST_FILE:  # the change is meant, not an accident
            data["digest"] = manifest_digest(data)
        path.write_text(json.dumps(data), "utf-8")

    return damage


def write(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def shorten(name: str, count: int = 100) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def flip(name: str) -> Damage:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


def edit_tensor(shard: str, name: str, change: Callable[[Any], Any]) -> Damage:
    """Change a tensor of a safetensors file; None removes it."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / shard)
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value
        save_file(tensors, folder / shard)

    return damage


class Evil:
    """Would leave a file behind if a loader ran the pickle's code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def evil_pickle(folder: Path) -> None:
    torch.save({"model.norm.weight": Evil(folder.parent / "ran")}, folder / BINS[0])


def huge_png() -> bytes:
    """A picture that says that it has 50000 x 50000 pixels, and has next to none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
