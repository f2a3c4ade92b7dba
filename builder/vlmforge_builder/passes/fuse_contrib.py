"""Join what ONNX Runtime has one kernel for: a sum and its RMS norm, and x * sigmoid(x)."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from typing_extensions import override

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class FuseContribPass(ir.passes.InPlacePass):
    """Fuse wherever a graph allows it.

    `RMSNormalization(a + b)` becomes SkipSimplifiedLayerNormalization, which gives the sum too;
    `x * sigmoid(x)` becomes QuickGelu with a factor of 1
    (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
    """

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, before = model.graph, len(model.graph)
        for node in tuple(graph):
            if node.op_type == "RMSNormalization":
                _fuse_norm(graph, node)
            elif node.op_type == "Mul":
                _fuse_silu(graph, node)
        changed = len(graph) != before
        if changed:
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=changed)


def _fuse_norm(graph: ir.Graph, norm: ir.Node) -> None:
    total, scale = norm.inputs
    add = total.producer() if total is not None else None
    if add is None or add.op_type != "Add" or scale is None or total is None:
        return
    first, second = add.inputs
    types = {value.dtype for value in (first, second, scale) if value is not None}
    shapes = {str(value.shape) for value in (first, second, total) if value is not None}
    if len(types) != 1 or len(shapes) != 1 or total.shape is None or len(total.shape) != 3:
        return
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [first, second, scale],
        attributes={"epsilon": norm.attributes["epsilon"].as_float()},
        domain=DOMAIN,
        num_outputs=4,
        name=norm.name,
    )
    _, mean, deviation, _ = fused.outputs
    mean.name = deviation.name = ""  # not asked for
    old = (norm.outputs[0], total)
    ir.convenience.replace_nodes_and_values(
        graph, norm, [norm, add], [fused], old, (fused.outputs[0], fused.outputs[3])
    )


def _fuse_silu(graph: ir.Graph, product: ir.Node) -> None:
    for index in (0, 1):
        value, other = product.inputs[index], product.inputs[1 - index]
        gate = value.producer() if value is not None else None
        if gate is None or gate.op_type != "Sigmoid" or gate.inputs[0] is not other:
            continue
        if value is not None and len(value.uses()) == 1:
            fused = ir.node(
                "QuickGelu", [other], attributes={"alpha": 1.0}, domain=DOMAIN, name=product.name
            )
            ir.convenience.replace_nodes_and_values(
                graph, product, [product, gate], [fused], product.outputs, fused.outputs
            )
            return
