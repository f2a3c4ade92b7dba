"""The paged ops by their function bodies, and the pass that makes them, against the dense ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.inliner import inline_local_functions

from dense_attention import (
    OUTPUTS,
    ROTARY,
    Array,
    Arrays,
    Shape,
    attention_node,
    bodies,
    model_of,
    run_body,
    session,
)
from vlmforge_builder.ops import DOMAIN
from vlmforge_builder.passes.paged_attention import PagedAttentionPass


@dataclass(frozen=True)
class Pages:
    """A dense call, its rows' tokens that are there, and how pages hold the caches."""

    dense: Shape
    lengths: tuple[int, ...]
    page_size: int

    @property
    def columns(self) -> int:
        return -(-self.dense.capacity // self.page_size)

    def table(self) -> NDArray[np.int32]:
        """Random pages of a pool of `pages`; -1 where a sequence has none."""
        rng = np.random.default_rng(self.dense.seed)
        rows = len(self.lengths)
        table = rng.permutation(self.pages)[: rows * self.columns].reshape(rows, self.columns)
        for row, (past, new) in enumerate(zip(self.dense.past, self.lengths, strict=True)):
            table[row, -(-(past + new) // self.page_size) :] = -1
        return table.astype(np.int32)

    @property
    def pages(self) -> int:
        return len(self.lengths) * self.columns + 2

    def pool(self, cache: Array) -> Array:
        """The first tokens of each sequence in its pages; all else is poison."""
        shape = (self.pages, self.dense.kv_heads, self.page_size, self.dense.head_dim)
        pool = np.full(shape, np.nan, np.float32)
        table = self.table()
        for row, past in enumerate(self.dense.past):
            for place in range(past):
                page = table[row, place // self.page_size]
                pool[page, :, place % self.page_size] = cache[row, :, place]
        return pool

    def inputs(self) -> Arrays:
        dense = self.dense.inputs()
        pools = {name: self.pool(dense[name]) for name in ("past_key", "past_value")}
        lengths = np.array(self.lengths, np.int32)
        return {**dense, **pools, "query_lengths": lengths, "block_table": self.table()}


@st.composite
def paged_calls(draw: st.DrawFn) -> Pages:
    rows = draw(st.integers(1, 4))
    tokens = draw(st.integers(1, 20))
    lengths = draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows))
    past = draw(st.lists(st.integers(0, 70), min_size=rows, max_size=rows))
    dense = Shape(
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([16, 32])),
        past=tuple(past),
        tokens=tokens,
        slack=draw(st.integers(0, 20)),
        seed=draw(st.integers(0, 2**32 - 1)),
        plain=draw(st.booleans()),
    )
    return Pages(dense, tuple(lengths), draw(st.sampled_from([16, 32, 64])))


FIXED = Pages(Shape(2, 2, 16, (7, 0, 20, 16), 5, 4, seed=2), (5, 0, 3, 1), 16)


def dense_model(shape: Shape, inputs: Arrays) -> ir.Model:
    model = model_of([attention_node(shape, ("query", "key", "value"))], inputs, OUTPUTS)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name is not None and value.name.startswith(("past_k", "past_v", "present")):
            value.shape = ir.Shape(["batch", shape.kv_heads, "capacity", shape.head_dim])
        if value.name == "past_lengths":
            value.shape = ir.Shape(["batch"])
    return model


def lowered(call: Pages) -> ir.Model:
    model = dense_model(call.dense, call.dense.inputs())
    assert PagedAttentionPass(call.page_size)(model).modified
    return model


def run_paged(model: ir.Model, inputs: Arrays) -> list[Array]:
    for function in bodies():
        model.functions[function.identifier()] = function
    # Inlined: the types that a session deduces for a function's parameters leave fp8 out.
    whole = inline_local_functions(ir.to_proto(model))
    return list(session(ir.from_proto(whole)).run(None, inputs))


def check(call: Pages) -> None:
    dense, inputs = call.dense.inputs(), call.inputs()
    expected = run_body(dense_model(call.dense, dense), dense)
    out, *pools = run_paged(lowered(call), inputs)
    before = (inputs["past_key"], inputs["past_value"])
    wanted = [pool.copy() for pool in before]
    for row, (past, new) in enumerate(zip(call.dense.past, call.lengths, strict=True)):
        np.testing.assert_allclose(out[row, :new], expected[0][row, :new], atol=2e-5, rtol=1e-5)
        for place in range(past, past + new):
            page = inputs["block_table"][row, place // call.page_size]
            for pool, cache in zip(wanted, expected[1:], strict=True):
                pool[page, :, place % call.page_size] = cache[row, :, place]
    # The poison stays wherever no token was written.
    for found, pool in zip(pools, wanted, strict=True):
        np.testing.assert_allclose(found, pool, atol=2e-6, rtol=1e-6, equal_nan=True)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(pool))


@settings(max_examples=20)
@given(paged_calls())
def test_the_paged_body_equals_the_dense_one(call: Pages) -> None:
    check(call)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_ragged_rows_with_an_inactive_one(page_size: int, plain: bool) -> None:
    check(replace(FIXED, dense=replace(FIXED.dense, plain=plain), page_size=page_size))


FP8 = ir.DataType.FLOAT8E4M3FN


def rounded(array: Array) -> Array:
    return np.asarray(array.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


def with_fp8_pools(call: Pages) -> ir.Model:
    """The op over fp8 pools, between casts: fp8 has no numpy type that the session takes."""
    model = dense_model(call.dense, call.dense.inputs())
    assert PagedAttentionPass(call.page_size, stored=FP8)(model).modified
    (node,) = (n for n in model.graph if n.domain == DOMAIN)
    for index in (1, 2):
        pool = node.inputs[index]
        assert pool is not None and pool.dtype == FP8
        pool.type = ir.TensorType(ir.DataType.FLOAT)
        cast = ir.node("Cast", [pool], attributes={"to": FP8})
        node.replace_input_with(index, cast.outputs[0])
        model.graph.insert_before(node, cast)
        out = node.outputs[index]
        assert out.dtype == FP8
        back = ir.node("Cast", [out], attributes={"to": ir.DataType.FLOAT})
        place = list(model.graph.outputs).index(out)
        back.outputs[0].name, out.name = out.name, f"{out.name}_fp8"
        back.outputs[0].type, back.outputs[0].shape = pool.type, out.shape
        model.graph.outputs[place] = back.outputs[0]
        model.graph.append(back)
    return model


def test_fp8_pools_hold_what_is_attended_over() -> None:
    """Keys and values are rounded as they are written, and the new ones are read back rounded."""
    call = replace(FIXED, dense=replace(FIXED.dense, plain=True))
    dense, inputs = call.dense.inputs(), call.inputs()
    stored = ("key", "value", "past_key", "past_value")
    dense |= {name: rounded(dense[name]) for name in stored}
    expected = run_body(dense_model(call.dense, dense), dense)
    out, *pools = run_paged(with_fp8_pools(call), inputs)
    for row, (past, new) in enumerate(zip(call.dense.past, call.lengths, strict=True)):
        np.testing.assert_allclose(out[row, :new], expected[0][row, :new], atol=2e-5, rtol=1e-5)
        for place in range(past + new):
            page = inputs["block_table"][row, place // call.page_size]
            for pool, cache in zip(pools, expected[1:], strict=True):
                found = pool[page, :, place % call.page_size]
                np.testing.assert_array_equal(found, rounded(cache[row, :, place]))


def test_without_any_token_nothing_is_written() -> None:
    check(replace(FIXED, lengths=(0, 0, 0, 0)))


@pytest.mark.parametrize("plain", [False, True])
def test_the_pass_adds_two_inputs_and_renames_nothing(plain: bool) -> None:
    call = replace(FIXED, dense=replace(FIXED.dense, plain=plain))
    before = dense_model(call.dense, call.dense.inputs())
    model = lowered(call)
    added: dict[str | None, Any] = {v.name: v for v in model.graph.inputs[-2:]}
    assert [v.name for v in model.graph.inputs[:-2]] == [v.name for v in before.graph.inputs]
    assert [v.name for v in model.graph.outputs] == [v.name for v in before.graph.outputs]
    assert list(added) == ["query_lengths", "block_table"]
    assert {value.dtype for value in added.values()} == {ir.DataType.INT32}
    assert list(added["query_lengths"].shape) == ["batch"]
    assert list(added["block_table"].shape) == ["batch", "sequence_pages"]
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name is not None and value.name.startswith(("past_k", "past_v", "present")):
            assert list(value.shape or ()) == ["pages", 2, 16, 16]


@pytest.mark.parametrize("plain", [False, True])
def test_the_node_is_the_plugins(plain: bool) -> None:
    call = replace(FIXED, dense=replace(FIXED.dense, plain=plain))
    (node,) = (n for n in lowered(call).graph if n.domain == DOMAIN)
    assert node.op_type == ("PlainPagedAttention" if plain else "PagedAttention")
    names = [value.name for value in node.inputs if value is not None]
    assert names[1:3] == ["past_key", "past_value"]
    assert names[4:] == ["query_lengths", "block_table", *(() if plain else ROTARY)]
    producers = [value.producer() for value in (node.inputs[0], node.inputs[3]) if value]
    assert [made.op_type for made in producers if made] == ["Concat", "Cast"]
    assert node.attributes["num_heads"].as_int() == call.dense.heads
    assert node.attributes["kv_num_heads"].as_int() == call.dense.kv_heads
    assert node.attributes["scale"].as_float() == pytest.approx(call.dense.scale)


def test_a_graph_without_the_ops_is_left_alone() -> None:
    model = lowered(FIXED)
    inputs = [value.name for value in model.graph.inputs]
    assert not PagedAttentionPass(page_size=16)(model).modified
    assert [value.name for value in model.graph.inputs] == inputs
