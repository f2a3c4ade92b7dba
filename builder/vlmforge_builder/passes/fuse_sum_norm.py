"""Join sums over the ranks with the residual and the RMS norm behind them: one kernel makes all."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from typing_extensions import override

from vlmforge_builder.ops.all_reduce import AllReduceNode
from vlmforge_builder.ops.all_reduce_norm import AllReduceNormNode
from vlmforge_plugins.collectives.launcher import row_fits


@dataclass(frozen=True)
class FuseSumNormPass(ir.passes.InPlacePass):
    """SkipSimplifiedLayerNormalization of a sum that nobody else takes becomes one with it.

    Rows must be such as the kernel takes.
    """

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [_fused(model.graph, node) for node in tuple(model.graph)]
        return ir.passes.PassResult(model, modified=any(found))


def _fused(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type != "SkipSimplifiedLayerNormalization":
        return False
    first, second, scale = node.inputs[:3]
    assert first is not None and second is not None and scale is not None
    for share, added in ((first, second), (second, first)):
        met = share.producer()
        if met is None or not AllReduceNode.is_of(met) or len(share.uses()) > 1:
            continue
        if not (scale.is_initializer() and _fits(scale)):
            return False
        normed, total = node.outputs[0], node.outputs[3]
        made = AllReduceNormNode(
            share=AllReduceNode.read(met).share,
            added=added,
            scale=scale,
            epsilon=node.attributes["epsilon"].as_float(),
            total=_like(share, f"{share.name}_total"),
            normed=_like(share, f"{share.name}_normed"),
        )
        fused = made.write(f"{node.name}_sum")
        ir.convenience.replace_nodes_and_values(
            graph, node, [node, met], [fused], (total, normed), (made.total, made.normed)
        )
        return True
    return False


def _fits(scale: ir.Value) -> bool:
    assert scale.shape is not None and scale.dtype is not None
    return row_fits(int(scale.shape.numpy()[0]), int(scale.dtype.itemsize))


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)
