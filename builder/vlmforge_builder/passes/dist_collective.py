"""Lower the meetings of ranks to TensorRT's own op, which calls NCCL inside a plan.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/DistCollective.html.
It gathers along the first axis; what is to be gathered along the last one is turned before and
behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tape import Tape
from typing_extensions import override

from vlmforge_builder.ops.all_gather import AllGatherNode
from vlmforge_builder.ops.all_reduce import AllReduceNode

# The parser knows the op by its name, in whatever domain.
DOMAIN = "trt"
OP_TYPE = "DistCollective"
_NO_ROOT = -1


@dataclass(frozen=True)
class DistCollectivePass(ir.passes.InPlacePass):
    """Replace every sum and gather of `ranks` ranks. A plan is of one of them."""

    ranks: int

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        sums, gathers = AllReduceNode.all_in(model.graph), AllGatherNode.all_in(model.graph)
        for summed in sums:
            self._lower_sum(model.graph, summed)
        for gathered in gathers:
            self._lower_gather(model.graph, gathered)
        found = bool(sums or gathers)
        if found:
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=found)

    def _lower_sum(self, graph: ir.Graph, meeting: AllReduceNode) -> None:
        tape = Tape()
        out = self._collective(tape, meeting.share, "all_reduce", "sum")
        _replace(graph, meeting.node, tape, out)

    def _lower_gather(self, graph: ir.Graph, meeting: AllGatherNode) -> None:
        assert meeting.share.shape is not None
        tape, axes = Tape(), len(meeting.share.shape)
        last = axes - 1
        first = tape.op("Transpose", [meeting.share], {"perm": [last, *range(last)]})
        whole = self._collective(tape, first, "all_gather", "none")
        turned = tape.op("Transpose", [whole], {"perm": [*range(1, axes), 0]})
        ends = [tape.op("Constant", [], {"value_ints": [n]}) for n in (0, meeting.width, last)]
        _replace(graph, meeting.node, tape, tape.op("Slice", [turned, *ends]))

    def _collective(self, tape: Tape, value: ir.Value, kind: str, reduction: str) -> ir.Value:
        attributes: dict[str, str | int] = {
            "collective_operation": kind,
            "reduce_op": reduction,
            "root": _NO_ROOT,
            "nb_rank": self.ranks,
        }
        return tape.op(OP_TYPE, [value], attributes, domain=DOMAIN)


def _replace(graph: ir.Graph, node: ir.Node, tape: Tape, out: ir.Value) -> None:
    name = node.name
    for index, made in enumerate(tape.nodes):
        made.name = made.outputs[0].name = f"{name}_{index}"
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [out])
