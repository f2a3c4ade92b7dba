"""Goldens of engines for GPUs: recorded by a processor in float32, met in 16 bits.

The engine runs by the stand-in, whose float16 segments round as a GPU's do.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from conftest import HF, build_once, cuda_engine
from vlmforge.backends.fake import cuda_on_cpu
from vlmforge.cli import main
from vlmforge.engine.bundle import Bundle
from vlmforge.engine.manifest import load_manifest
from vlmforge.evaluation.verify import STAGES, compare, limits_of, verify
from vlmforge_builder.targets import cuda
from vlmforge_plugins.cached_attention.compile import compile_one
from vlmforge_plugins.cached_attention.config import TARGETS


@pytest.fixture(scope="module")
def engine(shared: Path) -> Path:
    return cuda_engine(shared, HF.name)


def test_an_engine_gives_what_its_goldens_say(
    engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with cuda_on_cpu():
        assert main(["verify", str(engine)]) == 0
    said = capsys.readouterr().out
    assert said.count("ok  ") == 3 * len(STAGES)
    assert "tolerance 1e-01" in said and "4 ids equal" in said


def test_they_are_of_another_arithmetic_than_the_engines(engine: Path) -> None:
    with cuda_on_cpu():
        found = [result for result in verify(engine) if result.stage == "logits"]
    assert all("difference 0.0" not in result.detail for result in found)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("float16", "--weights", "int4"), id="int4"),
        pytest.param(("float16", "--weights", "int8"), id="int8", marks=pytest.mark.nightly),
        pytest.param(("float16", "--kv-dtype", "fp8"), id="fp8"),
    ],
)
def test_so_do_those_of_other_kinds(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = next(target for target in TARGETS if target.name == "sm_90")
    monkeypatch.setattr(
        cuda, "compile_set", lambda config, by, kept: (compile_one(config, hopper, by, kept),)
    )
    arguments = ("--target", "cuda", "--session-len", "1024", "--dtype", *options)
    engine = build_once(tmp_path / "engine", HF / "checkpoint", *arguments)
    with cuda_on_cpu():
        results = list(verify(engine))
    assert results and all(result.passed for result in results), results


def test_a_damaged_weight_is_seen_in_the_logits(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "engine"
    shutil.copytree(engine, copied)
    path = copied / "decoder.rank0.data"
    numbers = np.fromfile(path, np.float16)
    numbers[len(numbers) // 2 :] *= np.float16(1.5)
    numbers.tofile(path)
    monkeypatch.setattr(
        "vlmforge.evaluation.verify.open_bundle",
        lambda folder: Bundle(folder, load_manifest(folder)),
    )
    with cuda_on_cpu():
        first = next(result for result in verify(copied) if not result.passed)
    assert (first.case, first.stage) == ("text", "logits")


def test_limits_follow_from_what_is_calculated_in(engine: Path) -> None:
    manifest = load_manifest(engine)
    plain = limits_of(manifest)
    assert plain == {"pixels": 1e-5, "features": 3e-2, "logits": 0.1}
    fp8 = structs.replace(manifest, kv=structs.replace(manifest.kv, dtype="float8_e4m3fn"))
    assert limits_of(fp8) == {**plain, "logits": 0.4}


@pytest.mark.parametrize(
    ("margins", "found", "passed"),
    [
        ([9, 9, 9, 9], [1, 2, 3, 4], True),
        ([9, 9, 9, 9], [1, 2, 3, 5], False),
        ([9, 9, 0.2, 9], [1, 2, 7, 5], True),  # what two logits may decide either way
        ([9, 9, 0.2, 9], [1, 5, 3, 4], False),
        (None, [1, 2, 3, 5], False),
    ],
)
def test_greedy_tokens_count_as_far_as_they_are_decided(
    margins: list[float] | None, found: list[int], passed: bool
) -> None:
    golden = {"greedy": np.array([1, 2, 3, 4])}
    if margins is not None:
        golden["margins"] = np.array(margins)
    result = compare("a", "greedy", np.array(found), golden, {"logits": 0.1})
    assert result.passed == passed
