"""The names of the dtypes that weights can be stored in."""

from __future__ import annotations

DTYPE_NAMES = ("float32", "float16", "bfloat16")
