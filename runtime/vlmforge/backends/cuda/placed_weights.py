"""Weights that graphs take as inputs: where they are in files, and on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from vlmforge.backends.cuda.device import ITEM_BYTES, Device, Memory, Tensor
from vlmforge.engine.chain import BoundWeight, PartChain
from vlmforge.errors import EngineFormatError


class PlacedWeights(Struct, frozen=True):
    """Of a chain. The memory is kept as long as this is."""

    tensors: Mapping[BoundWeight, Tensor]
    kept: tuple[Memory, ...]

    def __getitem__(self, weight: BoundWeight) -> Tensor:
        return self.tensors[weight]


def place_weights(device: Device, folder: Path, chain: PartChain) -> PlacedWeights:
    """All of a chain in the device's memory, each once.

    Raises:
        EngineFormatError: one is not in its file.
        EngineError: there is not as much memory.
    """
    asked = dict.fromkeys(weight for segment in chain.segments for weight in segment.weights)
    files: dict[str, dict[tuple[int, int], None]] = {}
    for weight in asked:
        files.setdefault(weight.file, {})[_place(folder, weight)] = None
    there = {
        (file, place): memory
        for file, places in files.items()
        for place, memory in zip(places, device.weights(folder / file, [*places]), strict=True)
    }
    tensors = {
        weight: _tensor(weight, there[weight.file, _place(folder, weight)]) for weight in asked
    }
    return PlacedWeights(tensors, tuple(there.values()))


def _place(folder: Path, weight: BoundWeight) -> tuple[int, int]:
    """Offset and size (EngineFormatError: not in the file)."""
    spec, there = weight.tensor, (folder / weight.file).stat().st_size
    shape = [dim for dim in spec.shape if isinstance(dim, int)]
    size = ITEM_BYTES.get(spec.dtype, 0) * math.prod(shape)
    if not size or len(shape) < len(spec.shape) or weight.offset + size > there:
        raise EngineFormatError(
            f"The weight {spec.name!r} is not in its file.",
            found=f"{spec.dtype} {list(spec.shape)} at {weight.offset} of {weight.file}, "
            f"which has {there} bytes",
            expected="numbers of a known dtype and shape, all of them within the file",
            fix="build the engine again with build-engine",
        )
    return weight.offset, size


def _tensor(weight: BoundWeight, memory: Memory) -> Tensor:
    spec = weight.tensor
    shape = tuple(int(dim) for dim in spec.shape)
    return Tensor(spec.name, spec.dtype, shape, memory.address, weight.called, weight=True)
