"""All-reduce with what follows it in a decoder: the residual is added, and that is normalised.

`passes.fuse_sum_norm` makes it, where a target has one kernel for all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxscript import script

from vlmforge_builder.ops.node import OPSET, Floats, In, OpNode, Out, op


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceNormNode(OpNode):
    """The sum of all ranks' shares and `added` is `total`; `normed` is the RMS norm of that."""

    op_types: ClassVar[tuple[str, ...]] = ("AllReduceNorm",)

    share: In
    added: In
    scale: In
    epsilon: float
    total: Out
    normed: Out


@script(OPSET, default_opset=op)
def AllReduceNorm(  # noqa: N802
    share: Floats, added: Floats, scale: Floats, epsilon: float
) -> tuple[Floats, Floats]:
    """What it means for one rank, whose share is the sum already."""
    total = op.Add(share, added)
    normed = op.RMSNormalization(total, scale, axis=-1, epsilon=epsilon)
    return total, normed
