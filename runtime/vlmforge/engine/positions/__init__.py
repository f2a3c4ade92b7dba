"""Position policies: how the places of a sequence's tokens become rotary angles.

A tagged union, one file each. All of them answer `has_levels`, `level(prompt_tokens)`, and what
longer window than the built one an engine can be given at load: `most_tokens(built)` and
`longer_tables(positions)`.
"""

from __future__ import annotations

from typing import TypeAlias

from vlmforge.engine.positions.absolute import Absolute
from vlmforge.engine.positions.dynamic_ntk import DynamicNTK

__all__ = ["Absolute", "DynamicNTK", "PositionPolicy"]

PositionPolicy: TypeAlias = Absolute | DynamicNTK
