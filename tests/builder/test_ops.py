"""The typed records of ops: what they read, what they refuse, and that they and functions agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from dense_attention import OUTPUTS, Shape, attention_node, model_of
from vlmforge.errors import BuildError
from vlmforge_builder import ops, passes
from vlmforge_builder.ops import node as records
from vlmforge_builder.ops.all_gather import AllGatherNode
from vlmforge_builder.ops.all_reduce import AllReduceNode
from vlmforge_builder.ops.cached_attention import CachedAttentionNode
from vlmforge_builder.ops.dequantize_linear import DequantizeLinearNode
from vlmforge_builder.ops.gated_activation import GatedGeluNode, GatedSiluNode
from vlmforge_builder.ops.paged_attention import PagedAttentionNode
from vlmforge_builder.passes.assign_precision import AssignPrecisionPass
from vlmforge_builder.passes.lint import LintPass
from vlmforge_builder.passes.lower_cached_attention import LowerCachedAttentionPass

CALL = Shape(kv_heads=2, group=3, head_dim=16, past=(3, 0), tokens=2, slack=1, seed=0)
PLAIN = replace(CALL, plain=True)


def model(shape: Shape) -> ir.Model:
    return model_of([attention_node(shape, ("query", "key", "value"))], shape.inputs(), OUTPUTS)


def node(shape: Shape) -> ir.Node:
    return model(shape).graph[0]


def names(values: Sequence[ir.Value | None]) -> list[str | None]:
    return [value.name if value is not None else None for value in values]


@pytest.mark.parametrize("shape", [CALL, PLAIN])
def test_a_record_names_what_the_node_has(shape: Shape) -> None:
    made = node(shape)
    attention = CachedAttentionNode.read(made)
    assert attention.node is made
    assert attention.query.name == "query"
    assert attention.past_lengths.name == "past_lengths"
    assert names(attention.tables) == ([] if shape.plain else ["cos", "sin"])
    assert (attention.rotary is None) is shape.plain
    assert names(attention.outputs) == list(OUTPUTS)
    before, after = zip(*attention.caches, strict=True)
    assert names(before) == ["past_key", "past_value"]
    assert names(after) == ["present_key", "present_value"]
    assert (attention.num_heads, attention.kv_num_heads, attention.head_dim) == (6, 2, 16)
    assert attention.scale == pytest.approx(shape.scale)
    assert ops.read(made) == attention


@pytest.mark.parametrize("shape", [CALL, PLAIN])
def test_what_is_written_is_what_was_read(shape: Shape) -> None:
    made = node(shape)
    attention = CachedAttentionNode.read(made)
    outputs = {name: ir.Value(name=f"other_{name}") for name in OUTPUTS}
    copy = replace(attention, **outputs)  # type: ignore[arg-type]
    written = copy.write("other")
    assert (written.domain, written.op_type) == (made.domain, made.op_type)
    assert list(written.inputs) == list(made.inputs)
    assert list(written.outputs) == list(outputs.values())
    assert dict(written.attributes) == dict(made.attributes)
    assert CachedAttentionNode.read(written) == copy
    assert copy.node is written


@pytest.mark.parametrize("kind", ops.kinds())
def test_records_and_functions_have_the_same_names(kind: type[records.OpNode]) -> None:
    functions = {(f.domain, f.name): f for f in ops.functions()}
    hints = records._names(kind, "input", "table"), records._names(kind, "attribute")
    for op_type in kind.op_types:
        if kind.domain != ops.DOMAIN:
            assert (kind.domain, op_type) not in functions
            continue
        function = functions[kind.domain, op_type]
        inputs = [value.name for value in function.inputs]
        assert inputs == list(hints[0])[: len(inputs)]
        assert len(function.outputs) == len(records._names(kind, "output"))
        # What a function does not say is for those who run the op otherwise.
        assert set(hints[1]) - set(function.attributes) <= {"holds_kernels"}
        assert set(function.attributes) <= set(hints[1])


def test_all_ops_are_found() -> None:
    meetings = {AllReduceNode, AllGatherNode}
    others = {CachedAttentionNode, PagedAttentionNode, DequantizeLinearNode}
    gates = {GatedSiluNode, GatedGeluNode}
    assert meetings | gates | others == set(ops.kinds())
    assert CachedAttentionNode.all_in(model(CALL).graph)[0].op_type == "CachedAttention"
    assert CachedAttentionNode.all_in(model(PLAIN).graph)[0].op_type == "PlainCachedAttention"
    assert PagedAttentionNode.all_in(model(CALL).graph) == ()


def attributes(**changed: int | float | str | None) -> dict[str, ir.Attr]:
    values = {"num_heads": 6, "kv_num_heads": 2, "scale": 0.5} | changed
    given = {key: value for key, value in values.items() if value is not None}
    return {key: ir.convenience.convert_attribute(key, value) for key, value in given.items()}


def made(
    op_type: str, inputs: int, given: dict[str, ir.Attr], outputs: int = 3, skip: int | None = None
) -> ir.Node:
    values = [None if i == skip else ir.Value(name=f"v{i}") for i in range(inputs)]
    return ir.Node(ops.DOMAIN, op_type, values, given, num_outputs=outputs, name="it")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (made("PagedAttention", 8, attributes()), "vlmforge::PagedAttention"),
        (made("CachedAttention", 5, attributes()), "no past_lengths"),
        (made("CachedAttention", 8, attributes(), skip=1), "no key"),
        (made("CachedAttention", 9, attributes()), "9 inputs"),
        (made("CachedAttention", 8, attributes(), outputs=4), "4 outputs"),
        (made("CachedAttention", 8, attributes(), outputs=2), "no present_value"),
        (made("CachedAttention", 8, attributes(scale=None)), "no scale"),
        (made("CachedAttention", 8, attributes(scale=2)), "an attribute scale: INT"),
        (made("CachedAttention", 8, attributes(window=2)), "an attribute window: INT"),
        (made("CachedAttention", 6, attributes()), "CachedAttention"),
        (made("CachedAttention", 7, attributes()), "CachedAttention"),
        (made("PlainCachedAttention", 8, attributes()), "PlainCachedAttention"),
    ],
)
def test_a_node_that_is_not_as_its_record_says_is_refused(wrong: ir.Node, found: str) -> None:
    with pytest.raises(BuildError, match="'it' cannot be read as CachedAttention") as caught:
        CachedAttentionNode.read(wrong)
    assert caught.value.found == found


def test_a_cache_whose_width_is_not_said_is_refused() -> None:
    attention = CachedAttentionNode.read(made("CachedAttention", 8, attributes()))
    with pytest.raises(BuildError, match="cannot be read"):
        _ = attention.head_dim


NEXT_OP = """
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxscript import script
from torch import Tensor

from vlmforge_builder.ops.node import OPSET, Floats, In, OpNode, Out, Table, emit, op


def doubled_sum(x: Tensor, table: Tensor, ranks: int) -> Tensor:
    (result,) = emit("DoubledSum", (x, table), {"ranks": ranks}, like=(x,))
    return result


@script(OPSET, default_opset=op)
def DoubledSum(x: Floats, table: Floats, ranks: int) -> Floats:
    return op.Add(x, x)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoubledSumNode(OpNode):
    op_types: ClassVar[tuple[str, ...]] = ("DoubledSum",)

    x: In
    table: Table
    ranks: int
    out: Out
"""


def test_the_next_op_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doubled_sum.py").write_text(NEXT_OP, "utf-8")
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    assert "DoubledSum" in {function.name for function in ops.functions()}
    float32, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n"])
    x, table = (ir.Value(name=name, type=float32, shape=shape) for name in ("x", "table"))
    made = ir.node("DoubledSum", [x, table], {"ranks": 2}, domain=ops.DOMAIN)
    made.outputs[0].name, made.outputs[0].type = "out", float32
    graph = ir.Graph([x, table], made.outputs, nodes=[made], opset_imports={"": 23})
    AssignPrecisionPass("float16", {}, float32=("table",))(ir.Model(graph, ir_version=10))
    record = ops.read(made)
    assert record is not None
    assert names(record.tables) == ["table"]
    assert [value.dtype for value in record.inputs if value] == [
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT,
    ]
    assert record.outputs[0].dtype == ir.DataType.FLOAT16


# --- passes -----------------------------------------------------------------------------------


class Failing(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise KeyError("an error that is none of ours")


def test_our_errors_come_out_of_a_sequence_as_they_are() -> None:
    odd = replace(CALL, head_dim=24)
    sequence = ir.passes.Sequential(LintPass(), LowerCachedAttentionPass())
    with pytest.raises(BuildError, match="cannot rotate heads of this size"):
        passes.run(sequence, model(odd))
    with pytest.raises(ir.passes.PassError, match="Failing"):
        passes.run(ir.passes.Sequential(Failing()), model(CALL))


def attention(inputs: int, same: bool = False, **given: int | float) -> ir.Node:
    values = [ir.Value(name="one" if same else f"v{i}") for i in range(1 if same else inputs)]
    return ir.node("Attention", values * inputs if same else values, given, num_outputs=1)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (attention(7), "nonpad_kv_seqlen"),
        (attention(3, same=True), "are one tensor"),
        (attention(4, is_causal=1), "a mask and is_causal"),
        (attention(3, softcap=1.5), "softcap 1.5"),
        (ir.node("TensorScatter", [ir.Value(name="c"), ir.Value(name="x")]), "no input"),
        (ir.node("DequantizeLinear", [ir.Value(name=n) for n in "wsz"]), "a zero point"),
    ],
)
def test_traps_of_the_gpu_compilers_are_refused(wrong: ir.Node, found: str) -> None:
    graph = ir.Graph([], [], nodes=[wrong], opset_imports={"": 24})
    with pytest.raises(BuildError, match="compiled wrongly") as caught:
        LintPass()(ir.Model(graph, ir_version=10))
    assert caught.value.found is not None and found in caught.value.found


def test_what_is_no_trap_is_taken() -> None:
    nodes = [attention(4), attention(3, is_causal=1, softcap=0.0)]
    graph = ir.Graph([], [], nodes=nodes, opset_imports={"": 24})
    assert not LintPass()(ir.Model(graph, ir_version=10)).modified
