"""What a graph takes and gives: tensors, by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vlmforge.engine.fields import Dimension, Name


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a part. A string in `shape` is a symbolic dimension."""

    name: Name
    dtype: Name
    shape: tuple[Annotated[int | str, Dimension()], ...]
