"""All-reduce: the sum of a tensor over the tensor-parallel ranks; every rank gets it.

Behind a product of which each rank has some rows (https://arxiv.org/abs/1909.08053). Targets cut a
decoder where it stands (`passes.cut_chain`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxscript import script

from vlmforge_builder.ops.node import OPSET, Floats, In, OpNode, Out, op


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceNode(OpNode):
    """`share` of this rank to `out`, the sum of all ranks' shares, of the same shape."""

    op_types: ClassVar[tuple[str, ...]] = ("AllReduce",)

    share: In
    out: Out


@script(OPSET, default_opset=op)
def AllReduce(share: Floats) -> Floats:  # noqa: N802 - an ONNX function carries its op's name
    """What it means for one rank, which is the sum already."""
    return op.Identity(share)
