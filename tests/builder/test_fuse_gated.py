"""Gated activations: what the pass joins and what it leaves, and that both mean the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from lowered_decoder import session
from vlmforge_builder.ops import DOMAIN, functions, read
from vlmforge_builder.ops.gated_activation import GatedGeluNode, GatedSiluNode
from vlmforge_builder.passes.fuse_contrib import FuseContribPass
from vlmforge_builder.passes.fuse_gated import FuseGatedPass

WIDTH = 6
ROWS = ["batch", "tokens", WIDTH]
SILU = [
    helper.make_node("Sigmoid", ["gate"], ["open"]),
    helper.make_node("Mul", ["gate", "open"], ["act"]),
]
GELU = [helper.make_node("Gelu", ["gate"], ["act"])]
TANH = [helper.make_node("Gelu", ["gate"], ["act"], approximate="tanh")]
RELU = [helper.make_node("Relu", ["gate"], ["act"])]


def model(
    act: list[Any],
    split: dict[str, Any] | None = None,
    product: tuple[str, str] = ("act", "up"),
    parts: tuple[str, str] = ("gate", "up"),
    shape: tuple[Any, ...] = ("batch", "tokens", 2 * WIDTH),
    kind: int = TensorProto.FLOAT16,
    outputs: tuple[str, ...] = ("y",),
) -> ir.Model:
    """Lowered as far as that: SiLU is one node."""
    nodes = [
        helper.make_node("Split", ["x"], parts, **(split or {"axis": -1, "num_outputs": 2})),
        *act,
        helper.make_node("Mul", product, ["y"], name="product"),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, kind, ROWS) for name in outputs],
    )
    whole = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    found = ir.from_proto(onnx.shape_inference.infer_shapes(whole))
    FuseContribPass()(found)
    return found


def run(found: ir.Model, x: np.ndarray) -> np.ndarray:
    for function in functions():
        found.functions[function.identifier()] = function
    return np.asarray(session(found).run(None, {"x": x})[0])


@pytest.mark.parametrize("product", [("act", "up"), ("up", "act")], ids=" ".join)
@pytest.mark.parametrize(
    ("act", "activation"),
    [(SILU, "silu"), (GELU, "gelu"), (TANH, "gelu_tanh")],
    ids=["silu", "gelu", "gelu_tanh"],
)
def test_what_is_joined_means_the_same(
    act: list[Any], activation: str, product: tuple[str, str]
) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 2 * WIDTH)).astype(np.float16)
    expected = run(model(act, product=product), x)
    found = model(act, product=product)
    assert FuseGatedPass()(found).modified
    (node,) = found.graph
    record = read(node)
    assert isinstance(record, GatedSiluNode | GatedGeluNode)
    assert (record.packed.name, record.out.name, record.activation) == ("x", "y", activation)
    assert record.out.shape is not None and record.out.dtype == ir.DataType.FLOAT16
    assert found.opset_imports[DOMAIN] == 1
    np.testing.assert_allclose(run(found, x), expected, atol=4e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"act": RELU},
        {"parts": ("up", "gate")},
        {"product": ("act", "gate")},
        {"product": ("act", "act")},
        {"split": {"axis": 1, "num_outputs": 2}, "shape": ("batch", 4, WIDTH)},
        {"kind": TensorProto.FLOAT},
        {"outputs": ("y", "up")},
        {"outputs": ("y", "act")},
    ],
    ids=str,
)
def test_others_stay(change: dict[str, Any]) -> None:
    found = model(**{"act": SILU} | change)
    before = [node.op_type for node in found.graph]
    assert not FuseGatedPass()(found).modified
    assert [node.op_type for node in found.graph] == before
