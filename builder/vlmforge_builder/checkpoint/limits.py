"""Ranges of the numbers of a configuration: generous for real models, and far below what hangs.

Whole numbers are ranges; other numbers are a smallest and a largest value, both included.
"""

from __future__ import annotations

from typing import TypeAlias

Span: TypeAlias = tuple[float, float]

LAYERS = range(1, 1025)
FEATURE_LAYER = range(-1025, 1026)
"""An index into hidden states, from either end."""
HEADS = range(1, 4097)
HEAD_DIM = range(2, 8193, 2)
"""Even: rotary positions turn pairs."""
WIDTH = range(1, (1 << 20) + 1)
VOCABULARY = range(1, (1 << 24) + 1)
TOKEN = range(1 << 24)
POSITIONS = range(1, (1 << 24) + 1)
UNBOUNDED = range(1, 1 << 127)
"""Of a limit that may be so high that it means none."""
PIXELS = range(1, (1 << 14) + 1)
PATCH = range(1, (1 << 10) + 1)
TABLE = range(1, (1 << 24) + 1)
MERGE = range(1, 65)
FRAMES = range(1, 65)
TABLE = range(1, (1 << 24) + 1)
MERGE = range(1, 65)
FRAMES = range(1, 65)
EPSILON: Span = (0.0, 1.0)
ROTARY_BASE: Span = (1.0, 1e15)
SHARE: Span = (0.0, 1.0)
RATIO: Span = (1 / 64, 64.0)
SCALE: Span = (1e-9, 1e3)
