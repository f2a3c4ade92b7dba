"""What weights can be stored in."""

from __future__ import annotations

from collections.abc import Mapping

DTYPE_NAMES = ("float32", "float16", "bfloat16")
KV_DTYPES: Mapping[str, str] = {"fp8": "float8_e4m3fn"}
"""What `--kv-dtype` takes, and its name in a manifest."""
BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
"""What `--weights` takes, and the bits of a number."""
