"""Segments that are alike are one graph: what is so, what is bound, and the very same answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from msgspec import structs

from conftest import DATA, HF, build_once, cuda_engine, kernels_for_one_gpu
from vlmforge import pipeline
from vlmforge.backends import DecoderBatch
from vlmforge.backends.cuda.placed_weights import place_weights
from vlmforge.backends.fake import HostDevice, cuda_on_cpu
from vlmforge.engine.bundle import Bundle, open_bundle
from vlmforge.engine.chain import BoundWeight, ChainStep, PartChain, Segment
from vlmforge.engine.static_check import check_static
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import EngineFormatError
from vlmforge_builder.alike_segments import names_within, save_alike
from vlmforge_builder.chain_file import save_segments
from vlmforge_builder.targets import cuda

FLOAT16 = ir.TensorType(ir.DataType.FLOAT16)


def weight(name: str, offset: int, *shape: int) -> ir.Value:
    place = ir.ExternalTensor(
        "w.data", offset, None, FLOAT16.dtype, shape=ir.Shape(shape), name=name
    )
    return ir.Value(name=name, type=FLOAT16, shape=ir.Shape(shape), const_value=place)


def piece(number: int, op: str = "MatMul", width: int = 4, *, turned: bool = False) -> ir.Model:
    """`x{number} op w{number} + shared`, with the weight turned before or as it is."""
    given = ir.Value(name=f"x{number}", type=FLOAT16, shape=ir.Shape(["batch", "tokens", width]))
    own, shared = weight(f"w{number}", 64 * number, width, width), weight("shared", 4096, width)
    nodes = [ir.node("Transpose", [own], name=f"turn{number}")] if turned else []
    nodes.append(ir.node(op, [given, nodes[0].outputs[0] if turned else own]))
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], shared]))
    for node in nodes:
        node.outputs[0].name = f"{node.op_type}{number}"
    out = nodes[-1].outputs[0]
    out.type, out.shape = FLOAT16, given.shape
    graph = ir.Graph(
        [given], [out], nodes=nodes, initializers=[own, shared], opset_imports={"": 23}
    )
    return ir.Model(graph, ir_version=10)


def test_what_differs_in_weights_alone_is_one_graph(tmp_path: Path) -> None:
    pieces = [piece(0), piece(1), piece(2, "Mul"), piece(3), piece(4, width=8)]
    segments = save_alike(pieces, "d", tmp_path)
    assert [s.file[2:5] for s in segments] == ["000", "000", "002", "000", "004"]
    assert len([*tmp_path.iterdir()]) == 3
    for number in (0, 1, 3):
        one = segments[number]
        # The weight that all have stays in the graph.
        spec = TensorSpec(f"w{number}", "float16", (4, 4))
        assert one.weights == (BoundWeight(spec, "w0", "w.data", 64 * number),)
        assert one.called == {f"x{number}": "x0", f"Add{number}": "Add0"}
    model = ir.load(tmp_path / segments[3].file)
    assert [value.name for value in model.graph.inputs] == ["x0", "w0"]
    assert [*model.graph.initializers] == ["shared"]
    assert names_within(model, "Add3") == {"MatMul0": "MatMul3", "Add0": "Add3"}
    alone = segments[2]
    assert (alone.weights, alone.names) == ((), ())


def test_what_is_made_of_weights_alone_is_made_once(tmp_path: Path) -> None:
    """A library does so as it loads the graph: these keep theirs."""
    segments = save_alike([piece(0, turned=True), piece(1, turned=True)], "d", tmp_path)
    assert segments[0].file != segments[1].file and not any(s.weights for s in segments)


@pytest.mark.parametrize("kind", ["float16", pytest.param("int4", marks=pytest.mark.nightly)])
def test_answers_are_those_of_segments_apart(shared: Path, tmp_path: Path, kind: str) -> None:
    more = () if kind == "float16" else ("--weights", kind)
    options = ("--target", "cuda", "--dtype", "float16", "--session-len", 1024, "--skip-goldens")
    with kernels_for_one_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "save_alike", save_segments)
        checkpoint = DATA / HF.name / "checkpoint"
        apart = build_once(tmp_path / "apart.engine", checkpoint, *options, *more)
    found = []
    for engine in (cuda_engine(shared, HF.name, *more), apart):
        ids, asked = np.arange(40)[None] % 200, np.array([[3, 39]])
        with cuda_on_cpu(), pipeline(engine) as pipe:
            batch = DecoderBatch([0], ids, np.zeros(1, np.int64), None, asked, blocks=[[0]])
            found.append(pipe._engine.decoder.step(batch).copy())
    chain = open_bundle(apart).manifest.part("decoder").chain
    assert chain is not None and len(chain.kinds) == len(chain.segments)
    np.testing.assert_array_equal(*found)


def changed(bundle: Bundle, **fields: object) -> Bundle:
    """Another record of the last weight that is bound."""
    part = bundle.manifest.part("decoder")
    assert part.chain is not None
    last = [s for s in part.chain.segments if s.weights][-1]
    bound = structs.replace(last.weights[-1], **fields)  # type: ignore[arg-type]
    other = structs.replace(last, weights=(*last.weights[:-1], bound))
    steps = tuple(
        ChainStep(segment=other) if step.segment is last else step for step in part.chain.steps
    )
    made = structs.replace(part, chain=structs.replace(part.chain, steps=steps))
    parts = tuple(made if one is part else one for one in bundle.manifest.parts)
    return structs.replace(bundle, manifest=structs.replace(bundle.manifest, parts=parts))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"offset": 1 << 30}, "at 1073741824 of decoder.rank0.data"),
        ({"tensor": TensorSpec("other", "float16", (3, 5))}, "differ in names, dtypes or shapes"),
        ({"called": "nobody"}, "differ in names, dtypes or shapes"),
    ],
)
def test_weights_that_cannot_be_are_refused(
    shared: Path, fields: dict[str, object], said: str
) -> None:
    bundle = open_bundle(cuda_engine(shared, HF.name))
    failed = [one for one in check_static(changed(bundle, **fields)) if not one.passed]
    assert [(one.part, one.check) for one in failed] == [("decoder", "weights")]
    assert said in failed[0].detail


def test_a_weight_outside_its_file_is_not_loaded(tmp_path: Path) -> None:
    np.arange(8, dtype=np.uint8).tofile(tmp_path / "w.data")

    def chain(offset: int, dtype: str = "uint8") -> PartChain:
        weight = BoundWeight(TensorSpec("w", dtype, (2, 2)), "w0", "w.data", offset)
        segment = Segment("s", (), (), 0, weights=(weight,))
        return PartChain((ChainStep(segment=segment),), None, {})

    one = chain(4)
    placed = place_weights(HostDevice(), tmp_path, one)[one.segments[0].weights[0]]
    assert (placed.name, placed.in_graph, placed.shape) == ("w", "w0", (2, 2))
    for wrong in (chain(5), chain(4, "float16"), chain(0, "int3")):
        with pytest.raises(EngineFormatError, match="'w' is not in its file") as caught:
            place_weights(HostDevice(), tmp_path, wrong)
        assert "w.data, which has 8 bytes" in caught.value.found
