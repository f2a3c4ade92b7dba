"""What a graph takes and gives: tensors, by their names."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from vlmforge.engine.fields import Dimension, Name


class TensorSpec(Struct, frozen=True):
    """An input or output of a part. A string in `shape` is a symbolic dimension."""

    name: Name
    dtype: Name
    shape: tuple[Annotated[int | str, Dimension()], ...]
