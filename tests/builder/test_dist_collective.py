"""The meetings of ranks as TensorRT's own op, whose meaning here is that of its documentation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from vlmforge_builder.ops.all_gather import AllGatherNode
from vlmforge_builder.ops.all_reduce import AllReduceNode
from vlmforge_builder.passes.dist_collective import DistCollectivePass


def meeting(others: list[np.ndarray[Any, Any]]) -> type[OpRun]:
    """The op on the first of several ranks; the others give these where it gives the last axis."""

    class DistCollective(OpRun):
        op_domain = "trt"

        def _run(
            self, given: Any, *, collective_operation: str, reduce_op: str, root: int, nb_rank: int
        ) -> tuple[Any]:
            assert (root, nb_rank) == (-1, len(others) + 1)
            if collective_operation == "all_reduce":
                assert reduce_op == "sum"
                return (np.sum([given, *others], axis=0),)
            assert (collective_operation, reduce_op) == ("all_gather", "none")
            turned = [np.moveaxis(other, -1, 0) for other in others]
            return (np.concatenate([given, *turned]),)

    return DistCollective


@pytest.mark.parametrize("kind", [AllReduceNode, AllGatherNode])
@given(st.integers(2, 4), st.integers(1, 5), st.data())
def test_what_ranks_get(kind: type, ranks: int, width: int, data: st.DataObject) -> None:
    shares = list(np.random.default_rng(width).standard_normal((ranks, 2, 3, width), np.float32))
    float32 = ir.TensorType(ir.DataType.FLOAT)
    share = ir.Value(name="share", type=float32, shape=ir.Shape(["batch", 3, width]))
    out = ir.Value(name="out", type=float32)
    if kind is AllReduceNode:
        node, expected = AllReduceNode(share=share, out=out).write("sum"), np.sum(shares, axis=0)
    else:
        kept = data.draw(st.integers(1 + (ranks - 1) * width, ranks * width))
        node = AllGatherNode(share=share, width=kept, out=out).write("gather")
        expected = np.concatenate(shares, axis=-1)[..., :kept]
    graph = ir.Graph([share], [out], nodes=[node], opset_imports={"": 23}, name="it")
    model = ir.Model(graph, ir_version=10)
    DistCollectivePass(ranks)(model)
    assert graph.outputs[0].name == "out"
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[meeting(shares[1:])])
    (found,) = evaluator.run(None, {"share": shares[0]})
    np.testing.assert_allclose(found, expected, rtol=1e-6)
