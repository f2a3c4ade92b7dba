"""Types of fields with the values that they may hold, for the records that `schema` reads.

Ranges are wide: they keep nonsense from becoming a division by zero, an endless loop or all the
memory, and say nothing of what makes a good model.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, TypeAlias

from msgspec import Struct
from typing_extensions import override

from vlmforge.field_rules import Choice, Int, Number, Rule, Text


class RelativePath(Rule, Struct, frozen=True):
    """A path of a file inside the engine."""

    @override
    def admits(self, value: object) -> bool:
        if not isinstance(value, str) or not value or "\0" in value or len(value) > 4096:
            return False
        path = PurePosixPath(value)
        return not path.is_absolute() and ".." not in path.parts and bool(path.parts)

    def __str__(self) -> str:
        return "a path inside the engine"


class Sha256(Rule, Struct, frozen=True):
    """A sha256 in hex."""

    @override
    def admits(self, value: object) -> bool:
        return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None

    def __str__(self) -> str:
        return "64 digits of 0-9 and a-f"


class Dimension(Rule, Struct, frozen=True):
    """A dimension: a size, or a symbol."""

    @override
    def admits(self, value: object) -> bool:
        return value != "" if isinstance(value, str) else Int(0, 1 << 40).admits(value)

    def __str__(self) -> str:
        return "a size, or the name of one"


MOST_TOKENS = 1 << 22
"""Of one image."""

FLOATS = ("float32", "float16", "bfloat16")

Name: TypeAlias = Annotated[str, Text(empty=False)]
FilePath: TypeAlias = Annotated[str, RelativePath()]
FloatType: TypeAlias = Annotated[str, Choice(FLOATS)]
ByteCount: TypeAlias = Annotated[int, Int(0, 1 << 50)]
DimSize: TypeAlias = Annotated[int, Int(0, 1 << 40)]
TokenId: TypeAlias = Annotated[int, Int(0, (1 << 31) - 1)]
TokenCount: TypeAlias = Annotated[int, Int(1, 1 << 31)]
ImageTokens: TypeAlias = Annotated[int, Int(1, MOST_TOKENS)]
Count: TypeAlias = Annotated[int, Int(1, 1 << 20)]
Tiles: TypeAlias = Annotated[int, Int(1, 1 << 8)]
Pixels: TypeAlias = Annotated[int, Int(1, 1 << 13)]
Side: TypeAlias = Annotated[int, Int(1, 1 << 12)]
ColourLevel: TypeAlias = Annotated[int, Int(0, 255)]
Scale: TypeAlias = Annotated[float, Number(-1e6, 1e6)]
Divisor: TypeAlias = Annotated[float, Number(1e-12, 1e6)]
