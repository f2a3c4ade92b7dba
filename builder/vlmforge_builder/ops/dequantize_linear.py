"""DequantizeLinear of the standard, as this builder writes it: whole numbers in blocks, no zero.

Source: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html. It needs no meaning of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmforge_builder.ops.node import In, OpNode, Out


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantizeLinearNode(OpNode):
    """`numbers * scales`; along `axis`, `block_size` neighbours share a scale."""

    op_types: ClassVar[tuple[str, ...]] = ("DequantizeLinear",)
    domain: ClassVar[str] = ""

    numbers: In
    scales: In
    axis: int
    block_size: int
    out: Out
