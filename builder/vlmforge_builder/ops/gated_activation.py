"""Gated activations: the first half of each row through a function, times the second half.

SwiGLU and GEGLU of https://arxiv.org/abs/2002.05202. Targets that launch a kernel of their own cut
a decoder where one stands (`passes.cut_chain`); to others it is three standard ops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxscript import script

from vlmforge_builder.ops.node import OPSET, Floats, In, OpNode, Out, op


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedSiluNode(OpNode):
    """`packed [..., 2 n]` to `out [..., n]`, by x * sigmoid(x)."""

    op_types: ClassVar[tuple[str, ...]] = ("GatedSilu",)

    packed: In
    out: Out

    @property
    def activation(self) -> str:
        """As a chain tells it (`vlmforge.engine.chain.GatedActivation`)."""
        return "silu"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedGeluNode(OpNode):
    """`packed [..., 2 n]` to `out [..., n]`, by GELU: `approximate` is that of the op Gelu."""

    op_types: ClassVar[tuple[str, ...]] = ("GatedGelu",)

    packed: In
    approximate: str
    out: Out

    @property
    def activation(self) -> str:
        """As a chain tells it."""
        return "gelu_tanh" if self.approximate == "tanh" else "gelu"


@script(OPSET, default_opset=op)
def GatedSilu(packed: Floats) -> Floats:  # noqa: N802 - an ONNX function carries its op's name
    """What it means."""
    gate, up = op.Split(packed, num_outputs=2, axis=-1)
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


@script(OPSET, default_opset=op)
def GatedGelu(packed: Floats, approximate: str) -> Floats:  # noqa: N802
    """What it means."""
    gate, up = op.Split(packed, num_outputs=2, axis=-1)
    return op.Mul(op.Gelu(gate, approximate=approximate), up)
