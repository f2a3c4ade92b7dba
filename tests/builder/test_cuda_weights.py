"""Weights of whole numbers on the target cuda: the graphs, what they give, and their memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from conftest import HF, cuda_engine
from lowered_decoder import filled, model_spec, part_of, session
from vlmforge import EngineConfig, GenerationConfig, pipeline
from vlmforge.backends import DecoderBatch
from vlmforge.backends.fake import cuda_on_cpu
from vlmforge.engine.bundle import open_bundle
from vlmforge.engine.manifest import Manifest, load_manifest
from vlmforge.engine.static_check import check_static
from vlmforge_builder.block_quantisation import Blocks, quantise
from vlmforge_builder.passes.lower_cached_attention import LowerCachedAttentionPass
from vlmforge_builder.passes.quantise_weights import blocks_of_part

SPEC = model_spec(HF.name)
DECODER = part_of(SPEC, "decoder")
TRACED = cache(lambda: filled(SPEC, DECODER))
KINDS = ("int8", "int4")
# CUDA's MatMulNBits: power of two, from 16 on (matmul_nbits_helper.h); the kernel for one token
# has 16, 32, 64 and 128.
BLOCK_SIZES = {16, 32, 64, 128}
ELEMENTS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@cache
def cuts(kind: str) -> dict[str, Blocks]:
    """Of matrices, by their names."""
    found = blocks_of_part(TRACED().graph, DECODER, kind)
    return {name: blocks for name, blocks in found.items() if blocks.axis == 0}


Weight = tuple[str, int, list[int]]  # name, type, shape


def segments(
    engine: Path, manifest: Manifest
) -> Iterator[tuple[onnx.ModelProto, dict[str, Weight]]]:
    """Graphs, and their weights by what the graph calls them."""
    chain = manifest.part("decoder").chain
    assert chain is not None
    for segment in chain.segments:
        model = onnx.load(engine / segment.file, load_external_data=False)
        held = model.graph.initializer
        weights = {t.name: (t.name, t.data_type, list(t.dims)) for t in held}
        inputs = {item.name: item.type.tensor_type for item in model.graph.input}
        for bound in segment.weights:
            kind = inputs[bound.called]
            shape = [dim.dim_value for dim in kind.shape.dim]
            assert tuple(shape) == bound.tensor.shape
            weights[bound.called] = (bound.tensor.name, kind.elem_type, shape)
        yield model, weights


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int8", "float16"), ("int4", "float16"), ("int4", "bfloat16")]
)
def test_every_matrix_is_as_the_provider_takes_it(shared: Path, kind: str, dtype: str) -> None:
    """Types and shapes of com.microsoft::MatMulNBits, whose kernels have T1 for both A and scales.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """
    more = ("--weights", kind) if dtype == "float16" else ("--weights", kind, "--dtype", dtype)
    engine = cuda_engine(shared, HF.name, *more)
    manifest = load_manifest(engine)
    assert (manifest.backend, manifest.quantisation, manifest.dtype) == ("cuda", kind, dtype)
    found = {}
    for model, weights in segments(engine, manifest):
        kinds = {node.op_type for node in model.graph.node}
        assert not kinds & {"DequantizeLinear", "GatherBlockQuantized", "MatMul"}
        for node in model.graph.node:
            if node.op_type != "MatMulNBits":
                continue
            assert node.domain == "com.microsoft" and len(node.input) == 3  # no zero points
            given = {item.name: item.i for item in node.attribute}
            numbers, scales = weights[node.input[1]], weights[node.input[2]]
            size, blocks = given["block_size"], given["K"] // given["block_size"]
            assert size in BLOCK_SIZES and given["K"] == size * blocks
            assert given["N"] % 8 == given["K"] % 8 == given["accuracy_level"] == 0
            packed = [given["N"], blocks, size * given["bits"] // 8]
            assert numbers[1:] == (TensorProto.UINT8, packed)
            assert scales[1:] == (ELEMENTS[dtype], [given["N"], blocks])
            found[numbers[0]] = given["bits"]
    assert found == {name: blocks.bits for name, blocks in cuts(kind).items()}
    assert all(result.passed for result in check_static(open_bundle(engine)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_its_numbers_stand_for(shared: Path, kind: str) -> None:
    """The whole engine, its weights packed, against float32 products of the dequantised weights."""
    oracle = TRACED().clone()
    LowerCachedAttentionPass()(oracle)
    for name, blocks in cuts(kind).items():
        value = oracle.graph.initializers[name]
        assert value.const_value is not None
        values = torch.from_numpy(value.const_value.numpy())
        numbers, scales = (tensor.numpy() for tensor in quantise(values, blocks, "float16"))
        whole = numbers * np.repeat(scales.astype(np.float32), blocks.size, axis=0)
        value.const_value = ir.tensor(whole.astype(np.float32), name=name)
    ids = np.random.default_rng(0).integers(0, SPEC.vocab_size, (1, 40))
    asked = np.array([[3, 39]])
    expected = run(oracle, ids, asked)
    with cuda_on_cpu(), pipeline(cuda_engine(shared, HF.name, "--weights", kind)) as pipe:
        batch = DecoderBatch([0], ids, np.zeros(1, np.int64), None, asked, blocks=[[0]])
        found = pipe._engine.decoder.step(batch)
    spread = np.abs(expected).max()
    assert np.abs(found - expected).max() < 2e-3 * spread
    plain = TRACED().clone()
    LowerCachedAttentionPass()(plain)
    assert np.abs(run(plain, ids, asked) - expected).max() > 4e-3 * spread  # it says something


def run(model: ir.Model, ids: NDArray[np.int64], asked: NDArray[np.int64]) -> NDArray[np.float32]:
    kv = SPEC.kv
    empty = np.zeros((1, kv.kv_heads, 64, kv.head_dim), np.float32)
    given: dict[str, NDArray[np.generic]] = {
        "input_ids": ids,
        "image_features": np.zeros((1, SPEC.hidden_size), np.float32),
        "past_lengths": np.zeros(1, np.int64),
        "logits_indices": asked,
    }
    feeds = {value.name: given.get(value.name or "", empty) for value in model.graph.inputs}
    return np.asarray(session(model).run(["logits"], feeds)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_small_as_its_bits_say(shared: Path, kind: str) -> None:
    manifest = load_manifest(cuda_engine(shared, HF.name, "--weights", kind))
    part = manifest.part("decoder")
    assert part.chain is not None and part.loaded_bytes == part.weight_bytes
    sizes = {n: v.const_value.size for n, v in TRACED().graph.initializers.items() if v.const_value}
    saved = sum(
        2 * sizes[name] - sizes[name] * blocks.bits / 8 - 2 * sizes[name] / blocks.size
        for name, blocks in cuts(kind).items()
    )
    plain = load_manifest(cuda_engine(shared, HF.name)).part("decoder")
    assert plain.weight_bytes - part.weight_bytes == saved
    largest = max(sizes[name] for name in cuts(kind))
    assert max(segment.matrix_bytes for segment in part.chain.segments) == 2 * largest
    assert plain.chain is not None and not any(s.matrix_bytes for s in plain.chain.segments)


def test_answers_are_those_of_one_that_is_alone(shared: Path) -> None:
    """Batches, pages and replayed steps do with whole numbers what they do with others."""
    prompts = [f"number {n}, and so on" for n in range(3)]
    config = GenerationConfig(max_new_tokens=80)  # into the second of their pages
    engine = cuda_engine(shared, HF.name, "--weights", "int4")
    with cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=4)) as pipe:
        alone = [pipe(prompt, gen_config=config).token_ids for prompt in prompts]
        assert max(len(tokens) for tokens in alone) == 80
        assert [answer.token_ids for answer in pipe(prompts, gen_config=config)] == alone
