"""float16, bfloat16 and fp8 E4M3: values to bits and back, rounded to nearest even.

numpy lacks two of them. E4M3 is that of "FP8 Formats for Deep Learning" (arXiv:2209.05433): no
infinities, one NaN, 448 is the largest.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

DTYPES: Mapping[str, type[np.unsignedinteger]] = {
    "float16": np.uint16,
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
}


def _e4m3_values() -> NDArray[np.float64]:
    codes = np.arange(127)  # positive and finite; 127 is NaN
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa / 512, (8 + mantissa) * 2.0 ** (exponent - 10))


E4M3 = _e4m3_values()


def encode(values: NDArray[np.floating], kind: str) -> NDArray[np.unsignedinteger]:
    """The bits of the nearest numbers of `kind`; fp8 saturates at 448. Finite values only."""
    if kind == "float16":
        return values.astype(np.float16).view(np.uint16)
    if kind == "bfloat16":
        if values.dtype == np.float32:
            bits = np.ascontiguousarray(values).view(np.uint32)
            return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        # Rounding float64 to float32 first could round twice; keep a sticky bit instead.
        single = values.astype(np.float32)
        bits = single.view(np.uint32).astype(np.int64)
        error = np.sign(values - single) * np.sign(single)
        tie = (bits & 0xFFFF) == 0x8000
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(tie & (error != 0), (bits >> 16) + (error > 0), rounded).astype(np.uint16)
    size = np.minimum(np.abs(values.astype(np.float64)), 448.0)
    above = np.minimum(np.searchsorted(E4M3, size), 126)
    below = np.maximum(above - 1, 0)
    gap_below, gap_above = size - E4M3[below], E4M3[above] - size
    down = (gap_below < gap_above) | ((gap_below == gap_above) & (below % 2 == 0))
    codes: NDArray[np.uint8] = np.where(down, below, above).astype(np.uint8)
    signs: NDArray[np.uint8] = np.signbit(values).astype(np.uint8) << 7
    return codes | signs


def decode(bits: NDArray[np.unsignedinteger], kind: str) -> NDArray[np.float64]:
    """The numbers that `bits` stand for, exactly."""
    if kind == "float16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    numbers: NDArray[np.float64] = np.concatenate([E4M3, [np.nan], -E4M3, [np.nan]])[bits]
    return numbers


def rounded(values: NDArray[np.floating], kind: str) -> NDArray[np.float64]:
    """`values` as `kind` keeps them."""
    return decode(encode(values, kind), kind)
