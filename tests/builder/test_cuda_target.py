"""The target cuda: what it refuses, what its passes change and what they leave, what it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from conftest import HF, cuda_engine
from lowered_decoder import session
from named_kernels import HOPPER
from vlmforge.engine.interface import interface_of
from vlmforge.engine.manifest import load_manifest
from vlmforge.errors import ConfigError
from vlmforge_builder.ops.all_reduce_norm import AllReduceNormNode
from vlmforge_builder.passes.float32_features import Float32FeaturesPass
from vlmforge_builder.passes.fuse_contrib import FuseContribPass
from vlmforge_builder.passes.fuse_sum_norm import FuseSumNormPass
from vlmforge_builder.passes.likeliest_token import likeliest_token
from vlmforge_builder.passes.scratch import token_bytes
from vlmforge_builder.targets import Settings, cuda, load_target
from vlmforge_builder.targets.cuda import PAGE_SIZE, _config
from vlmforge_plugins.cached_attention.config import TARGETS, Config
from vlmforge_plugins.token_choice.launcher import MOST_VOCAB, scratch_bytes

SETTINGS = Settings("float16", None, 128, 2, None, None, None)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"dtype": "float32"}, "--dtype float32"),
        ({"attention": "native"}, "'native'"),
        ({"compute_capability": "9.0"}, "'9.0'"),
        ({"kv_dtype": "fp4"}, "--kv-dtype fp4"),
    ],
    ids=str,
)
def test_what_it_does_not_have_is_refused_early(change: dict[str, str], found: str) -> None:
    target = load_target("cuda")
    target.check(SETTINGS)
    target.check(replace(SETTINGS, kv_dtype="fp8", weights="int4"))
    with pytest.raises(ConfigError) as caught:
        target.check(replace(SETTINGS, **change))  # type: ignore[arg-type]
    assert caught.value.found == found
    assert caught.value.expected and caught.value.fix


def test_heads_without_kernels_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        _config(48, SETTINGS)
    assert caught.value.found == "head size 48"
    assert caught.value.fix == "build for the processor: --target onnxruntime"


# --- passes -------------------------------------------------------------------------------------


def graph(nodes: list[Any], outputs: dict[str, list[Any]], **inputs: list[Any]) -> ir.Model:
    def values(shapes: dict[str, list[Any]]) -> list[Any]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]

    made = helper.make_graph(nodes, "g", values(inputs), values(outputs))
    imports = [helper.make_opsetid("", 23)]
    model = helper.make_model(made, opset_imports=imports, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    return list(session(model).run(None, feeds))


def op_types(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


ROWS = ["batch", "tokens", 16]


def drawn(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_sum_and_its_norm_become_one_and_give_both() -> None:
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"], name="add"),
        helper.make_node("RMSNormalization", ["sum", "w"], ["norm"], epsilon=1e-5, name="norm"),
    ]
    outputs = {"norm": ROWS, "sum": ROWS}
    model = graph(nodes, outputs, x=ROWS, y=ROWS, w=[16])
    feeds = drawn(x=(2, 3, 16), y=(2, 3, 16), w=(16,))
    expected = run(model, **feeds)
    assert FuseContribPass()(model).modified
    assert op_types(model) == ["SkipSimplifiedLayerNormalization"]
    for found, wanted in zip(run(model, **feeds), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_sum_of_other_shapes_stays() -> None:
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("RMSNormalization", ["sum", "w"], ["norm"], epsilon=1e-5),
    ]
    model = graph(nodes, {"norm": ROWS}, x=ROWS, y=[16], w=[16])
    assert not FuseContribPass()(model).modified


def met(width: int, takers: int = 1, swapped: bool = False) -> ir.Model:
    """A sum over the ranks, and its residual and norm; others may take the sum as well."""
    float32 = ir.TensorType(ir.DataType.FLOAT)

    def value(name: str, *shape: object) -> ir.Value:
        return ir.Value(name=name, type=float32, shape=ir.Shape(shape))  # type: ignore[arg-type]

    share, more, total = (value(name, *ROWS[:2], width) for name in ("share", "more", "sum"))
    weight = value("w", width)
    weight.const_value = ir.tensor(np.ones(width, np.float32), name="w")
    given = [more, total] if swapped else [total, more]
    skip = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*given, weight],
        {"epsilon": 1e-5},
        domain="com.microsoft",
        num_outputs=4,
        name="norm",
    )
    for output, name in zip(skip.outputs, ("n", "", "", "t"), strict=True):
        output.name, output.type, output.shape = name, float32, share.shape
    nodes = [ir.node("AllReduce", [share], domain="vlmforge", outputs=[total]), skip]
    nodes += [ir.node("Neg", [total]) for _ in range(takers - 1)]
    outputs = [skip.outputs[0], skip.outputs[3]]
    graph = ir.Graph([share, more], outputs, nodes=nodes, initializers=[weight])
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_sum_over_the_ranks_is_one_with_its_norm(swapped: bool) -> None:
    model = met(16, swapped=swapped)
    assert FuseSumNormPass()(model).modified
    (node,) = model.graph
    made = AllReduceNormNode.read(node)
    assert (made.share.name, made.added.name, made.scale.name) == ("share", "more", "w")
    assert [value.name for value in model.graph.outputs] == ["n", "t"]
    assert (made.normed, made.total) == tuple(model.graph.outputs)
    assert made.epsilon == pytest.approx(1e-5)


@pytest.mark.parametrize("odd", [met(15), met(1 << 13), met(16, takers=2)])
def test_a_sum_that_others_take_or_in_odd_rows_stays(odd: ir.Model) -> None:
    assert not FuseSumNormPass()(odd).modified


@pytest.mark.parametrize("first", [True, False])
def test_a_gate_becomes_one(first: bool) -> None:
    product = ["x", "gate"] if first else ["gate", "x"]
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["gate"]),
        helper.make_node("Mul", product, ["y"]),
    ]
    model = graph(nodes, {"y": ROWS}, x=ROWS)
    feeds = drawn(x=(2, 3, 16))
    (expected,) = run(model, **feeds)
    assert FuseContribPass()(model).modified
    assert op_types(model) == ["QuickGelu"]
    np.testing.assert_allclose(run(model, **feeds)[0], expected, atol=1e-5)


def test_other_products_with_a_gate_stay() -> None:
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["gate"]),
        helper.make_node("Mul", ["gate", "z"], ["y"]),
    ]
    assert not FuseContribPass()(graph(nodes, {"y": ROWS}, x=ROWS, z=ROWS)).modified


def test_features_are_taken_and_given_in_float32() -> None:
    node = helper.make_node("Neg", ["image_features"], ["y"])
    model = graph([node], {"y": ROWS}, image_features=ROWS)
    assert not Float32FeaturesPass()(model).modified
    for value in (model.graph.inputs[0], model.graph.outputs[0]):
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    assert Float32FeaturesPass()(model).modified
    (given,) = model.graph.inputs
    assert (given.name, given.dtype) == ("image_features", ir.DataType.FLOAT)
    assert op_types(model) == ["Cast", "Neg"]
    feeds = drawn(image_features=(1, 2, 16))
    np.testing.assert_allclose(run(model, **feeds)[0], -feeds["image_features"], atol=2e-3)


SIZES = st.one_of(st.integers(2, 40), st.sampled_from([257, 512, 704, 32_064]))


@given(SIZES, st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_likeliest_token_is_the_lowest_of_equals(size: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 3, (rows, 2, size)).astype(np.float32)  # full of equals
    broken = rng.random((rows, 2)) < 0.2
    places = rng.integers(0, size, (rows, 2, 1))
    odd = rng.choice([np.nan, np.inf, -np.inf], (rows, 2, 1)).astype(np.float32)
    expected = np.where(broken, -1, logits.argmax(-1))
    put = np.where(broken[..., None], odd, np.take_along_axis(logits, places, -1))
    np.put_along_axis(logits, places, put, -1)
    (found,) = run(likeliest_token(size), logits=logits)
    assert sum(one == "TopK" for one in op_types(likeliest_token(size))) == 2 + (size > 257)
    np.testing.assert_array_equal(found, expected)


def test_memory_is_that_of_what_lives_at_once() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),  # 64 bytes a token
        helper.make_node("Concat", ["a", "a"], ["b"], axis=-1),  # 128, while a lives
        helper.make_node("Neg", ["b"], ["c"]),  # 128, while b lives
        helper.make_node("Split", ["c"], ["d", "e"], axis=-1, num_outputs=2),
        helper.make_node("Add", ["d", "e"], ["y"]),
    ]
    assert token_bytes(graph(nodes, {"y": ROWS}, x=ROWS).graph) == 256


# --- what it writes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(shared: Path) -> Path:
    return cuda_engine(shared, HF.name)


def test_an_engine_carries_the_kernels_of_every_gpu(engine: Path) -> None:
    manifest = load_manifest(engine)
    part = manifest.part("decoder")
    assert (manifest.backend, manifest.compute_dtype) == ("cuda", "float16")
    assert (manifest.kv.dtype, manifest.kv.page_size) == ("float16", PAGE_SIZE)
    listed = {entry.path for entry in manifest.files}
    assert part.chain is not None
    assert set(part.chain.kernels) == {*(target.name for target in TARGETS), "ptx"}
    for target, file in part.chain.kernels.items():
        code = (engine / file).read_bytes()
        assert file in listed
        if target == HOPPER.name:
            assert code[:4] == b"\x7fELF" and len(code) > 10_000
        else:  # as the compiler gave it
            config = Config(manifest.kv.head_dim, "float16", "float16")
            assert code.startswith(f"{config.name} for {target}\0".encode())
    assert (part.inputs, part.outputs) == (
        interface_of(manifest, "decoder").inputs,
        interface_of(manifest, "decoder").outputs,
    )


@pytest.mark.parametrize(("vocab_size", "there"), [(MOST_VOCAB, True), (MOST_VOCAB + 1, False)])
def test_tokens_of_a_vast_vocabulary_are_chosen_by_graphs(
    vocab_size: int, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(compiled: object, stem: str, folder: Path) -> dict[str, str]:
        return {"ptx": f"{stem}.ptx"}

    monkeypatch.setattr(cuda, "write_kernels", write)
    job: Any = SimpleNamespace(
        described=False,
        settings=Settings("float16", None, 64, 1, None, None, None),
        folder=tmp_path,
        rank=SimpleNamespace(of=1),
    )
    config = Config(64, "float16", "float16")
    made = cuda._kernels(config, None, vocab_size, job)
    assert bool(made.choosers) is there
    assert made.files == (*made.attention.values(), *made.choosers.values())
    assert (cuda._choosing_bytes(vocab_size) == scratch_bytes(1, vocab_size)) is there


def test_all_pieces_take_their_weights_from_one_file(engine: Path) -> None:
    part = load_manifest(engine).part("decoder")
    assert part.chain is not None
    places: list[tuple[int, int]] = []
    for segment in part.chain.segments:
        model = onnx.load(engine / segment.file, load_external_data=False)
        assert (engine / segment.file).stat().st_size < 20_000
        for weight in model.graph.initializer:
            if weight.data_location == TensorProto.EXTERNAL:
                entry = {item.key: item.value for item in weight.external_data}
                assert entry["location"] == part.data[0]
                places.append((int(entry["offset"]), int(entry["length"])))
        for bound in segment.weights:
            assert (bound.file, bound.tensor.dtype) == (part.data[0], "float16")
            places.append((bound.offset, 2 * int(np.prod(bound.tensor.shape))))
    tables = part.chain.rotary
    assert tables is not None
    size = 4 * tables.positions * tables.width
    places += [(tables.cos_offset, size), (tables.sin_offset, size)]
    assert sum(length for _, length in set(places)) == part.weight_bytes


def test_rotary_tables_are_where_the_manifest_says(engine: Path) -> None:
    chain = load_manifest(engine).part("decoder").chain
    assert chain is not None and chain.rotary is not None
    count = chain.rotary.positions * chain.rotary.width
    cos, sin = (
        np.fromfile(engine / chain.rotary.file, np.float32, count, offset=offset)
        for offset in (chain.rotary.cos_offset, chain.rotary.sin_offset)
    )
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    assert (cos[: chain.rotary.width] == 1).all()  # of position 0
