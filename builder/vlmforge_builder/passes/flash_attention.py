"""Lower attention without a mask to the one of ONNX Runtime whose memory grows with the tokens.

ONNX's `Attention` keeps a score for each pair: of an image of 16,384 patches a gibibyte a head. The
CPU kernel of `com.microsoft::MultiHeadAttention` works in tiles (https://arxiv.org/abs/2205.14135)
where query, key and value come as rows of all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tape import Tape
from typing_extensions import override

DOMAIN = "com.microsoft"
_HEADS_FIRST = {"perm": [0, 2, 1, 3]}


@dataclass(frozen=True)
class FlashAttentionPass(ir.passes.InPlacePass):
    """Replace every `Attention` of three inputs `[n, heads, tokens, width]`, all of one shape."""

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in tuple(model.graph) if _fits(node)]
        for index, node in enumerate(found):
            _lower(model.graph, node, f"flash_{index}")
        if found:
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=bool(found))


def _fits(node: ir.Node) -> bool:
    given = [value for value in node.inputs if value is not None]
    shapes = {str(value.shape) for value in given}
    heads = isinstance(_heads(node), int)
    plain = all(not attr.value for name, attr in node.attributes.items() if name != "scale")
    return node.op_type == "Attention" and len(given) == 3 and len(shapes) == 1 and heads and plain


def _heads(node: ir.Node) -> object:
    shape = None if not node.inputs or node.inputs[0] is None else node.inputs[0].shape
    return shape[1] if shape is not None and len(shape) == 4 else None


def _lower(graph: ir.Graph, node: ir.Node, name: str) -> None:
    tape, heads = Tape(), _heads(node)
    assert isinstance(heads, int)
    rows = tape.op("Constant", [], {"value_ints": [0, 0, -1]})
    apart = tape.op("Constant", [], {"value_ints": [0, 0, heads, -1]})
    flat = [
        tape.op("Reshape", [tape.op("Transpose", [value], _HEADS_FIRST), rows])
        for value in node.inputs
        if value is not None
    ]
    scale = node.attributes.get("scale")
    given = {"num_heads": heads, **({} if scale is None else {"scale": scale.as_float()})}
    mixed = tape.op("MultiHeadAttention", flat, given, domain=DOMAIN)
    out = tape.op("Transpose", [tape.op("Reshape", [mixed, apart])], _HEADS_FIRST)
    for index, made in enumerate(tape.nodes):  # a graph would count on from what it made before
        made.name = made.outputs[0].name = f"{name}_{index}"
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, (out,))
