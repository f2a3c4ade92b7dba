"""`vlmforge verify --layers`: sound engines part nowhere, damaged ones where they are damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec import structs

from conftest import DATA, HF, cuda_engine, golden_engine
from vlmforge.cli import main
from vlmforge.cli import verify as command
from vlmforge.engine.bundle import Bundle
from vlmforge.engine.manifest import MANIFEST_FILE, dump_manifest, load_manifest
from vlmforge.errors import BackendUnavailableError, ConfigError
from vlmforge_builder import build, layers, watched_graphs
from vlmforge_builder.layers import TensorResult, compare_engine
from vlmforge_builder.watched_graphs import WEIGHT, Watched, draw, watch_engine

CHECKPOINT = HF / "checkpoint"


@pytest.fixture(autouse=True)
def _kept_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_graphs, "trace", build.trace)  # as builds have them


@pytest.fixture(scope="module")
def engine(shared: Path) -> Path:
    return cuda_engine(shared, HF.name)


def names(results: list[TensorResult], part: str) -> set[str]:
    return {result.name for result in results if result.part == part}


@pytest.mark.parametrize("target", ["cuda", "onnxruntime"])
def test_a_sound_engine_is_its_checkpoint(shared: Path, engine: Path, target: str) -> None:
    folder = engine if target == "cuda" else golden_engine(shared, HF.name)
    results = list(compare_engine(folder, CHECKPOINT))
    assert all(result.passed for result in results)
    # What each layer gives is among them, whatever the passes made of it.
    ops = [result.op for result in results if result.part == "decoder"]
    layers = load_manifest(folder).kv.layers
    attention = {"cuda": "attention", "onnxruntime": "GroupQueryAttention"}[target]
    assert ops.count(attention) >= layers and ops.count("MatMul") >= 4 * layers
    assert "logits" in names(results, "decoder")
    assert "image_features" in names(results, "vision")
    worst = max(result.error for result in results)
    assert 0 < worst < {"cuda": 1e-2, "onnxruntime": 1e-4}[target]


def test_one_engine_against_another_of_other_weights(shared: Path) -> None:
    quantised = cuda_engine(shared, HF.name, "--weights", "int8")
    whole = golden_engine(shared, HF.name)
    results = list(compare_engine(quantised, whole))
    assert all(result.passed for result in results)
    assert {"MatMulNBits", "attention"} <= {result.op for result in results}
    # As strict as for float32 the first matrix of whole numbers parts, and no table before it.
    first = next(result for result in compare_engine(quantised, whole, 1e-3) if not result.passed)
    assert (first.part, first.op) == ("decoder", "MatMulNBits")


def product(engine: Path, layer: int) -> tuple[str, slice]:
    """The weight of the last product of a layer, and where that is in the data file."""
    chain = load_manifest(engine).part("decoder").chain
    assert chain is not None
    model = onnx.load(engine / chain.segments[2 * layer + 2].file, load_external_data=False)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    place = {item.key: item.value for item in weights[node.input[1]].external_data}
    begin = int(place["offset"])
    return node.input[1], slice(begin, begin + int(place["length"]))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_damaged_matrix_is_named(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layer: int
) -> None:
    weight, place = product(engine, layer)
    damaged = tmp_path / "engine"
    shutil.copytree(engine, damaged)
    data = np.fromfile(damaged / "decoder.rank0.data", np.uint8)
    data[place].view(np.float16)[::7] *= np.float16(1.5)
    data.tofile(damaged / "decoder.rank0.data")
    results = list(compare_engine(damaged, CHECKPOINT if layer else engine))
    first = next(result for result in results if not result.passed)
    assert (first.part, first.name, first.op) == ("decoder", weight, WEIGHT)
    assert layers._report(results) == 1
    said = capsys.readouterr().out
    assert f"in the part decoder: {weight!r} of {WEIGHT}, off by " in said


def test_a_damaged_weight_of_a_graph_that_others_share_is_named(
    engine: Path, tmp_path: Path
) -> None:
    chain = load_manifest(engine).part("decoder").chain
    assert chain is not None
    *_, last = (segment for segment in chain.segments if segment.weights)
    bound = last.weights[-1]
    assert bound.tensor.name != bound.called
    damaged = tmp_path / "engine"
    shutil.copytree(engine, damaged)
    data = np.fromfile(damaged / bound.file, np.uint8)
    size = 2 * int(np.prod(bound.tensor.shape))
    data[bound.offset : bound.offset + size].view(np.float16)[::7] *= np.float16(1.5)
    data.tofile(damaged / bound.file)
    results = list(compare_engine(damaged, CHECKPOINT))
    first = next(result for result in results if not result.passed)
    assert (first.part, first.name, first.op) == ("decoder", bound.tensor.name, WEIGHT)
    # What comes of it is named as the checkpoint has it, and not as the graph.
    behind = {result.name for result in results if not result.passed}
    assert {spec.name for spec in last.outputs} & behind


@pytest.mark.parametrize("op", ["attention", "gated activation"])
def test_a_call_that_is_wrong_is_named(engine: Path, tmp_path: Path, op: str) -> None:
    manifest, wrong = load_manifest(engine), tmp_path / "engine"
    decoder = manifest.part("decoder")
    assert decoder.chain is not None
    planted = decoder.chain.attention[1]
    steps = tuple(
        structs.replace(step, attention=structs.replace(planted, scale=1))
        if op == "attention" and step.attention is planted
        else step
        if op == "attention" or step.gated is None
        else structs.replace(step, gated=structs.replace(step.gated, activation="gelu"))
        for step in decoder.chain.steps
    )
    out = planted.out if op == "attention" else decoder.chain.gates[0].out
    parts = (
        manifest.part("vision"),
        structs.replace(decoder, chain=structs.replace(decoder.chain, steps=steps)),
    )
    shutil.copytree(engine, wrong)
    (wrong / MANIFEST_FILE).write_text(
        dump_manifest(structs.replace(manifest, parts=parts)), "utf-8"
    )
    first = next(result for result in compare_engine(wrong, engine) if not result.passed)
    assert (first.name, first.op) == (out, op)


def test_a_plan_shows_nothing_of_its_inside(engine: Path) -> None:
    manifest = structs.replace(load_manifest(engine), backend="tensorrt_rtx")
    with pytest.raises(BackendUnavailableError, match="tensor by tensor") as caught:
        watch_engine(Bundle(engine, manifest), "decoder", draw(manifest, "decoder"))
    assert "--target cuda" in caught.value.fix


def test_engines_without_a_tensor_in_common() -> None:
    one, other = (Watched({name: np.ones(2, np.float32)}) for name in ("a", "b"))
    with pytest.raises(ConfigError, match="no tensor of the part decoder in common"):
        list(layers._compare("decoder", one, other, 1.0))


def test_what_is_not_finite_parts() -> None:
    one, other = (Watched({"a": np.array([1.0, x], np.float32)}) for x in (np.nan, 1.0))
    (result,) = layers._compare("decoder", one, other, 1.0)
    assert not result.passed


# --- the command ----------------------------------------------------------------------------------


def test_the_command_runs_the_builder(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append(arguments)
        return subprocess.CompletedProcess(arguments, 1)

    monkeypatch.setattr(command.subprocess, "run", run)
    assert main(["verify", str(engine), "--layers", "--against", "c", "--limit", "0.5"]) == 1
    run_as = [sys.executable, "-P", "-m", "vlmforge_builder.layers", str(engine)]
    assert asked == [[*run_as, "--against", "c", "--limit", "0.5"]]


@pytest.mark.parametrize("asked", [("--layers",), ("--limit", "0.5")])
def test_the_command_needs_a_reference(
    engine: Path, capsys: pytest.CaptureFixture[str], asked: tuple[str, ...]
) -> None:
    assert main(["verify", str(engine), *asked]) == 1
    assert f"vlmforge verify {engine} --layers --against checkpoint" in capsys.readouterr().err


def test_the_command_needs_the_builder(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["verify", str(engine), "--layers", "--against", "c"]) == 1
    assert "pip install 'vlmforge[build]'" in capsys.readouterr().err


def test_an_error_has_its_words(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert layers.main([str(engine), "--against", str(DATA / "nothing")]) == 1
    assert "CheckpointError" in capsys.readouterr().err
