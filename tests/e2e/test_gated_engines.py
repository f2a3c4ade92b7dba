"""Decoders with gated activations between their segments answer as those with them inside."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from typing_extensions import override

from conftest import DATA, HF, IMAGES, build_once, cuda_engine, kernels_for_one_gpu
from host_gates import HostGates
from vlmforge import GenerationConfig, pipeline
from vlmforge.backends import fake
from vlmforge.backends.fake import cuda_on_cpu
from vlmforge.cli import main
from vlmforge.engine.manifest import load_manifest
from vlmforge_builder.targets import cuda
from vlmforge_plugins.cached_attention.config import TARGETS
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.gated_activation.launcher import Params

PROMPTS = ["Write one line about cats.", ("What is this?", str(IMAGES / "tall_300x900.png"))]


class _Nothing(ir.passes.InPlacePass):
    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, modified=False)


class _Counted(HostGates):
    rows: list[int] = []  # noqa: RUF012 - of all that were made

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        self.rows.append(params.groups // params.row_groups)
        super().launch(launch, params, stream)


def tokens(engine: Path) -> list[list[int]]:
    greedy = GenerationConfig(max_new_tokens=12, ignore_eos=True)
    with cuda_on_cpu(), pipeline(engine) as pipe:
        return [answer.token_ids for answer in pipe(PROMPTS, gen_config=greedy)]  # type: ignore[union-attr]


def test_an_engine_of_before_and_one_of_today_give_the_same_tokens(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Today's by the compiled kernel, one of before by three ops of the library."""
    engine, checkpoint = cuda_engine(shared, HF.name), DATA / HF.name / "checkpoint"
    options = ("--target", "cuda", "--dtype", "float16", "--session-len", 1024, "--skip-goldens")
    with kernels_for_one_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "FuseGatedPass", _Nothing)
        before = build_once(tmp_path / "before.engine", checkpoint, *options)
    chains = [load_manifest(one).part("decoder").chain for one in (engine, before)]
    assert all(chain is not None for chain in chains)
    now, then = (chain for chain in chains if chain is not None)
    assert (len(now.gates), len(then.gates), then.activations) == (2, 0, {})
    assert len(now.segments) == len(then.segments) + 2
    assert set(now.activations) == {*(target.name for target in TARGETS), "ptx"}
    assert now.segments[1].token_bytes < then.segments[1].token_bytes
    monkeypatch.setattr(fake, "NumpyGates", _Counted)
    assert tokens(engine) == tokens(before)
    assert {1, 2} & {*_Counted.rows} and max(_Counted.rows) > 100  # decoded, and prompts


def test_inspect_tells_them(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(cuda_engine(shared, HF.name))]) == 0
    said = capsys.readouterr().out
    assert "6 segments of 5 graphs, " in said
    assert "2 launches of attention and 2 gated activations between them; kernels for" in said
