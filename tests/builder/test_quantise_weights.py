"""Which weights are quantised, and that what reads them gives what their numbers say."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from conftest import HF, build_once
from lowered_decoder import filled, model_spec, part_of, session
from vlmforge import EngineConfig, pipeline
from vlmforge.backends import DecoderBatch
from vlmforge.engine.manifest import load_manifest
from vlmforge_builder.block_quantisation import Blocks, ForMatMulNBits, InBlocks, quantise
from vlmforge_builder.ops.dequantize_linear import DequantizeLinearNode
from vlmforge_builder.passes.lint import LintPass
from vlmforge_builder.passes.lower_cached_attention import LowerCachedAttentionPass
from vlmforge_builder.passes.lower_dequantize import LowerDequantizePass
from vlmforge_builder.passes.quantise_weights import (
    QuantiseWeightsPass,
    blocks_of_part,
    choose_blocks,
)
from vlmforge_builder.weights import Computed

Array = NDArray[np.float32]
SPEC = model_spec(HF.name)
DECODER = part_of(SPEC, "decoder")
TRACED = cache(lambda: filled(SPEC, DECODER))
KINDS = ("int8", "int4")


def dequantised(values: Array, blocks: Blocks) -> Array:
    """The weights that the numbers and scales stand for, by numpy."""
    numbers, scales = (t.numpy() for t in quantise(torch.from_numpy(values), blocks, "float32"))
    return np.asarray(numbers * np.repeat(scales, blocks.size, axis=blocks.axis), np.float32)


def values_of(model: ir.Model) -> dict[str, Array]:
    tensors = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return {name: t.numpy() for name, t in tensors if t is not None and name in DECODER.weights}


def feeds(model: ir.Model, seed: int) -> dict[str, NDArray[np.generic]]:
    """A prompt of eleven tokens of two sequences, without a picture, over empty caches."""
    rng = np.random.default_rng(seed)
    kv, hidden = SPEC.kv, SPEC.hidden_size
    cache = np.zeros((2, kv.kv_heads, 16, kv.head_dim), np.float32)
    given: dict[str, NDArray[np.generic]] = {
        "input_ids": rng.integers(0, SPEC.vocab_size, (2, 11)),
        "image_features": np.zeros((1, hidden), np.float32),
        "past_lengths": np.zeros(2, np.int64),
        "logits_indices": np.array([[3, 10], [0, 10]]),
    }
    names = (value.name or "" for value in model.graph.inputs)
    return {name: given.get(name, cache) for name in names}


def logits(model: ir.Model, seed: int = 0) -> Array:
    return np.asarray(session(model).run(["logits"], feeds(model, seed))[0])


def with_values(model: ir.Model, values: dict[str, Array]) -> ir.Model:
    for name, array in values.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return model


def quantised(model: ir.Model, kind: str) -> dict[str, Blocks]:
    blocks = blocks_of_part(model.graph, DECODER, kind)
    assert QuantiseWeightsPass(blocks)(model).modified
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_the_products_are_those_of_the_dequantised_weights(kind: str) -> None:
    """MatMulNBits in full precision against plain float32 products of what the numbers stand for.

    The quantised weights of the oracle come by numpy, those of the subject packed as in an engine.
    """
    subject, oracle = TRACED().clone(), TRACED().clone()
    values = values_of(oracle)
    blocks = quantised(subject, kind)
    for model in (subject, oracle):
        assert LowerCachedAttentionPass()(model).modified
    assert LowerDequantizePass(accuracy_level=1)(subject).modified
    for name, cut in blocks.items():
        encoding = InBlocks(cut, "float32") if cut.axis else ForMatMulNBits(cut)
        tensors = encoding.encode(torch.from_numpy(values[name]))
        for described, tensor in zip(
            encoding.tensors(name, values[name].shape), tensors, strict=True
        ):
            value = subject.graph.initializers[described.name]
            assert value.dtype is not None
            value.const_value = ir.tensor(
                tensor.contiguous().numpy().reshape(described.shape)
                if described.dtype != "int4"
                else quantise(torch.from_numpy(values[name]), cut, "float32")[0].numpy(),
                dtype=value.dtype,
                name=described.name,
            )
    with_values(oracle, {name: dequantised(values[name], cut) for name, cut in blocks.items()})
    found, expected = logits(subject), logits(oracle)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert np.abs(logits(filled_lowered()) - expected).max() > 100 * np.abs(found - expected).max()


def filled_lowered() -> ir.Model:
    model = TRACED().clone()
    LowerCachedAttentionPass()(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_of_the_gpu_targets(kind: str) -> None:
    """Blocked DequantizeLinear without a zero point, in front of every product and the table."""
    model = TRACED().clone()
    blocks = quantised(model, kind)
    made = DequantizeLinearNode.all_in(model.graph)
    assert len(made) == len(blocks) == 4 * SPEC.kv.layers + 2
    assert {len(weight.node.inputs) for weight in made} == {2}
    for weight in made:
        cut = blocks[weight.numbers.name or ""]
        assert weight.numbers.dtype == (ir.DataType.INT4 if cut.bits == 4 else ir.DataType.INT8)
        assert weight.scales.dtype == weight.out.dtype == ir.DataType.FLOAT
        assert (weight.axis, weight.block_size) == (cut.axis, cut.size)
    products = [node for node in model.graph if node.op_type == "MatMul"]
    sources = [node.inputs[1].producer() for node in products if node.inputs[1] is not None]
    assert {node.op_type if node else None for node in sources} == {"DequantizeLinear"}
    LintPass()(model)


def small_model(vocabulary: int, inner: int) -> ir.Model:
    """`head(inner(table[ids]))`, and a table of positions that only looks like a weight."""

    def weight(name: str, *shape: int) -> ir.Value:
        tensor = ir.tensor(np.zeros(shape, np.float32), name=name)
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        value.const_value = tensor
        return value

    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    table, head = weight("table", vocabulary, 64), weight("head", 64, vocabulary)
    layers = [weight(f"layer.{i}", 64, 64) for i in range(inner)]
    odd = weight("odd", 64, 64)
    nodes = [ir.node("Gather", [table, ids])]
    for layer in layers:
        nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], layer]))
    nodes.append(ir.node("MatMul", [odd, nodes[-1].outputs[0]]))  # a matrix on the other side
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], head]))
    weights = [table, *layers, odd, head]
    graph = ir.Graph([ids], [nodes[-1].outputs[0]], nodes=nodes, initializers=weights)
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (2, {"head": 4, "table": 4}),
        (14, {"head": 8, "table": 4}),
        (40, {"head": 8, "table": 8}),
    ],
)
def test_eight_bits_for_what_is_a_small_share(inner: int, expected: dict[str, int]) -> None:
    names = ["table", *(f"layer.{i}" for i in range(inner)), "odd", "head"]
    found = choose_blocks(small_model(96, inner).graph, 4, names)
    assert {name: found[name].bits for name in ("head", "table")} == expected
    assert {found[f"layer.{i}"].bits for i in range(inner)} == {4}
    assert (found["head"].axis, found["table"].axis) == (0, 1)
    assert "odd" not in found
    whole = choose_blocks(small_model(96, inner).graph, 8, names)
    assert {blocks.bits for blocks in whole.values()} == {8}


def test_only_the_checkpoints_weights_of_a_decoder_are_quantised() -> None:
    for folder in (HF.name, "qwen_vl_chat"):
        spec = model_spec(folder)
        vision, decoder = part_of(spec, "vision"), part_of(spec, "decoder")
        assert blocks_of_part(filled(spec, vision).graph, vision, "int4") == {}
        assert blocks_of_part(filled(spec, decoder).graph, decoder, None) == {}
        blocks = blocks_of_part(filled(spec, decoder).graph, decoder, "int4")
        computed = {n for n, weight in decoder.weights.items() if isinstance(weight, Computed)}
        assert computed and not computed & set(blocks)


@pytest.mark.parametrize(("kind", "near"), [("int8", 0.03), ("int4", 0.6)])
def test_an_engine_of_quantised_weights(shared: Path, kind: str, near: float) -> None:
    """Its logits are near float32's, and its decoder as small as its bits say."""
    arguments = ("--session-len", "1024", "--weights", kind)
    engine = build_once(shared / f"quantised.{kind}", HF / "checkpoint", *arguments)
    manifest = load_manifest(engine)
    assert manifest.quantisation == kind
    part = manifest.part("decoder")
    sizes = {name: values.size for name, values in values_of(TRACED()).items()}
    computed = sum(n for name, n in sizes.items() if isinstance(DECODER.weights[name], Computed))
    assert part.loaded_bytes == part.weight_bytes
    share = (part.loaded_bytes / 4 - computed) / (sum(sizes.values()) - computed)
    assert share < {"int8": 0.29, "int4": 0.20}[kind]
    with pipeline(str(engine), EngineConfig(threads=1, max_batch_size=2)) as pipe:
        ids = feeds(filled_lowered(), 0)
        given = (ids["input_ids"], ids["past_lengths"], None, ids["logits_indices"])
        found = pipe._engine.decoder.step(DecoderBatch(range(len(given[0])), *given))
    expected = logits(filled_lowered())
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < near
