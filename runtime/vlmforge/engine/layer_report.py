"""The layers of a compiled part, as the compiler's parser made them, for `vlmforge inspect`.

A plan itself can only be read on a machine that can run it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from vlmforge.engine.regular_file import read_regular
from vlmforge.engine.schema import from_json, parse_json
from vlmforge.errors import EngineFormatError

_MOST_BYTES = 1 << 28


class LayerOutput(Struct, frozen=True):
    """A result of a layer. -1 in `shape` is a dimension that varies."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Layer(Struct, frozen=True):
    """A layer: its name, the compiler's word for its type, its inputs' names, and its outputs."""

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[LayerOutput, ...]


class LayerReport(Struct, frozen=True):
    """All layers of a part, in the order of the network."""

    layers: tuple[Layer, ...]

    @property
    def histogram(self) -> Mapping[str, int]:
        """How many layers of each type, the most frequent first."""
        return dict(Counter(layer.type for layer in self.layers).most_common())


def read_layers(path: Path) -> LayerReport:
    """Read a report (EngineFormatError: it is not one)."""
    try:
        data = parse_json(read_regular(path, _MOST_BYTES).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise EngineFormatError(
            f"The layer report {path.name} cannot be read.",
            found=str(error),
            expected="what build-engine wrote",
            fix="copy the engine again, or rebuild it with build-engine",
        ) from None
    return from_json(LayerReport, data, path.name)
