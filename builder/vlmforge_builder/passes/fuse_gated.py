"""Join the two halves of a row, an activation of one and their product: one of our own ops."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from typing_extensions import override

from vlmforge_builder.ops import DOMAIN, VERSION
from vlmforge_builder.ops.gated_activation import GatedGeluNode, GatedSiluNode

_SIXTEEN = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class FuseGatedPass(ir.passes.InPlacePass):
    """Fuse wherever a graph of 16 bits allows it; SiLU is fused already (`FuseContribPass`)."""

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, before = model.graph, len(model.graph)
        for node in tuple(graph):
            if node.op_type == "Mul":
                _fuse(graph, node)
        changed = len(graph) != before
        if changed:
            model.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified=changed)


def _fuse(graph: ir.Graph, product: ir.Node) -> None:
    """`product`, if it is one of an activation and the half behind."""
    for first, up in (product.inputs, product.inputs[::-1]):
        act = first.producer() if first is not None else None
        gate = act.inputs[0] if act is not None and act.inputs else None
        split = gate.producer() if gate is not None else None
        if act is None or split is None or up is None or not _halves(split, gate, up):
            continue
        packed, out = split.inputs[0], product.outputs[0]
        assert packed is not None
        fused = _node(act, packed, ir.Value(name=out.name, type=out.type, shape=out.shape))
        inner = [value for node in (split, act) for value in node.outputs]
        alone = all(len(v.uses()) == 1 and not v.is_graph_output() for v in inner)
        if fused is None or not alone:
            continue
        made = fused.write(product.name)
        ir.convenience.replace_nodes_and_values(
            graph, product, [product, act, split], [made], [out], made.outputs
        )
        return


def _node(act: ir.Node, packed: ir.Value, out: ir.Value) -> GatedSiluNode | GatedGeluNode | None:
    if act.op_type == "QuickGelu" and act.attributes["alpha"].as_float() == 1.0:
        return GatedSiluNode(packed=packed, out=out)
    if act.op_type == "Gelu":
        approximate = act.attributes.get("approximate")
        kind = "none" if approximate is None else approximate.as_string()
        return GatedGeluNode(packed=packed, approximate=kind, out=out)
    return None


def _halves(split: ir.Node, first: ir.Value | None, second: ir.Value) -> bool:
    """Whether they are the two halves of the rows `[batch, tokens, width]` of 16 bits."""
    whole, axis = split.inputs[0], split.attributes.get("axis")
    if split.op_type != "Split" or whole is None or whole.shape is None or axis is None:
        return False
    widths = [None if v.shape is None else v.shape[-1] for v in split.outputs]
    return (
        list(split.outputs) == [first, second]
        and len(whole.shape) == 3
        and axis.as_int() in (-1, 2)
        and whole.dtype in _SIXTEEN
        and isinstance(widths[0], int)
        and widths[0] == widths[1]
        and whole.shape[-1] == 2 * widths[0]
    )
