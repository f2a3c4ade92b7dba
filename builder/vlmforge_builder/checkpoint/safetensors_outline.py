"""A safetensors file with its header alone: as large as the real one, and nothing in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Entry = tuple[str, Sequence[int], Sequence[int]]
"""Dtype as the format spells it, shape, and [begin, end) in the data."""


def write_outline(path: Path, tensors: Mapping[str, Entry]) -> None:
    """Write the header of `tensors`, and a hole where their data would be.

    The format is https://huggingface.co/docs/safetensors.
    """
    entries = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
        for name, (dtype, shape, offsets) in tensors.items()
    }
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(
            8 + len(header) + max((end for _, _, (_, end) in tensors.values()), default=0)
        )
