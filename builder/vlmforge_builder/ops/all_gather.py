"""All-gather: the ranks' tensors one after the other along the last axis; every rank gets them.

Behind a product of which each rank has some columns (https://arxiv.org/abs/1909.08053), where the
whole is needed. Targets cut a decoder where it stands (`passes.cut_chain`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxscript import script

from vlmforge_builder.ops.node import OPSET, Floats, In, OpNode, Out, op


@dataclass(frozen=True, slots=True, kw_only=True)
class AllGatherNode(OpNode):
    """`share` of this rank, as wide as any other's, to `out`, of which `width` columns are kept."""

    op_types: ClassVar[tuple[str, ...]] = ("AllGather",)

    share: In
    width: int
    out: Out


@script(OPSET, default_opset=op)
def AllGather(share: Floats, width: int) -> Floats:  # noqa: N802
    """What it means for one rank: the columns without the padding behind them."""
    start, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[-1])
    end = op.Unsqueeze(op.Constant(value_int=width), start)
    return op.Slice(share, start, end, axis)
