"""`vlmforge plan`: its arithmetic is that of loading, and what it proposes fits."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

import vlmforge.cli
from sample_manifest import MANIFEST, RICH
from vlmforge.api.config import EngineConfig
from vlmforge.api.memory import load_options, part_memory
from vlmforge.api.plan import CONTEXT_BYTES, plan
from vlmforge.backends.features import device_features
from vlmforge.cli import main, plan_arguments
from vlmforge.cli import plan as command
from vlmforge.engine.bundle import Bundle
from vlmforge.engine.chain import ChainStep
from vlmforge.engine.manifest import MANIFEST_FILE, Manifest, ParallelLayout, dump_manifest
from vlmforge.errors import BackendUnavailableError, ConfigError, VlmforgeError
from vlmforge.runner.features import USUAL_BUDGET
from vlmforge_builder import command as builder

_DECODER = RICH.parts[1]
assert _DECODER.chain is not None


def _of_one_rank(step: ChainStep) -> ChainStep:
    """Nothing is summed, and nothing normalised: a share is taken as it is."""
    if step.attention is not None:
        call = structs.replace(step.attention, heads=32, kv_heads=32, head_dim=128)
        return structs.replace(step, attention=call)
    if step.segment is None:
        return step
    inputs = [
        structs.replace(s, name="out1") if s.name == "norm1" else s for s in step.segment.inputs
    ]
    return structs.replace(step, segment=structs.replace(step.segment, inputs=tuple(inputs)))


_STEPS = tuple(_of_one_rank(step) for step in _DECODER.chain.steps if step.collective is None)
PAGED = structs.replace(
    RICH,
    parts=(
        RICH.parts[0],
        structs.replace(_DECODER, chain=structs.replace(_DECODER.chain, steps=_STEPS)),
    ),
    parallel=ParallelLayout(1),
    backend="cuda",
    quantisation=None,
    kv=structs.replace(RICH.kv, kv_heads=32, head_dim=128, dtype="float16"),
    decode=structs.replace(RICH.decode, session_len=2048, max_batch_size=16),
)


def taken(manifest: Manifest, config: EngineConfig) -> float:
    rows, window = config.max_batch_size or 16, config.session_len or 2048
    tokens = min(2048, window * rows) + rows  # packed: prompts of several windows, and the others
    parts = sum(part_memory(part, tokens, rows).total for part in manifest.parts)
    images = device_features(manifest, USUAL_BUDGET)
    assert images is not None
    return CONTEXT_BYTES + parts + images.total


@given(
    megabytes=st.integers(1000, 3000),
    window=st.none() | st.integers(1, 2048),
    batch=st.none() | st.integers(1, 40),
)
def test_a_plan_is_what_loading_decides(
    megabytes: int, window: int | None, batch: int | None
) -> None:
    config = EngineConfig(session_len=window, max_batch_size=batch)
    free = megabytes * 10**6 - CONTEXT_BYTES
    found = plan(PAGED, config, megabytes * 10**6)
    try:
        options = load_options(Bundle(Path(), PAGED), config, free)
    except BackendUnavailableError as error:
        assert (found.cache, found.fits) == (None, False)
        assert found.refusal is not None and found.refusal.found == error.found
        return
    assert found.fits and found.cache is not None
    assert (found.cache.blocks, found.cache.sequences) == (options.blocks, options.slots)
    assert (found.cache.window, found.cache.block_tokens) == (options.capacity, 64)
    parts = sum(part.weights + part.activations + part.library for part in found.parts)
    assert found.context + parts == pytest.approx(taken(PAGED, config), abs=len(found.parts) * 3)
    assert found.context + parts + found.cache.bytes <= found.memory


@given(st.integers(1, 900))
def test_what_it_proposes_fits(megabytes: int) -> None:
    small = int(taken(PAGED, EngineConfig())) + megabytes * 10**4
    refusal = plan(PAGED, EngineConfig(), small).refusal
    assert refusal is not None
    memory = float(refusal.changes[-1].split()[3])
    assert plan(PAGED, EngineConfig(), int(memory * 1e9 + 0.1e9)).fits
    assert not plan(PAGED, EngineConfig(), int(memory * 1e9 - 0.1e9)).fits
    for change in refusal.changes:
        words = change.split()
        if "--session-len" not in words:
            continue
        window = int(words[words.index("--session-len") + 1])
        dtype = "float8_e4m3fn" if "fp8" in words else "float16"
        changed = structs.replace(PAGED, kv=structs.replace(PAGED.kv, dtype=dtype))
        assert plan(changed, EngineConfig(session_len=window), small).fits
        assert not plan(changed, EngineConfig(session_len=window + 64), small).fits


def test_an_engine_of_a_processor_has_the_whole_memory() -> None:
    found = plan(MANIFEST, EngineConfig(), 10**6)
    assert (found.context, [p.weights for p in found.parts]) == (0, [100, 200])
    assert found.cache is not None and found.cache.blocks == 2
    assert plan(MANIFEST, EngineConfig(), 400).refusal is not None


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 << 30), ("24 GB", 24 * 10**9), ("1.5gib", 3 << 29), ("4096", 4096)],
)
def test_sizes(text: str, size: int) -> None:
    assert command.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "80 GPUs", "1e9", "9999999999 GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="no size of a memory") as caught:
        command.parse_size(text)
    assert caught.value.found == repr(text)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    (tmp_path / MANIFEST_FILE).write_text(dump_manifest(PAGED), "utf-8")
    return tmp_path


def test_the_command_prints_a_table_or_json(
    engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(engine), "--gpu-memory", "24GiB"]) == 0
    text = capsys.readouterr().out
    assert "checkpoint for cuda, weights in float32\n" in text
    assert "It fits: 32,768 tokens at 32,768 bytes; 16 sequences at once of up to 2,048" in text
    assert main(["plan", str(engine), "--gpu-memory", "24GiB", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["fits"], data["cache"]["blocks"], data["memory"]) == (True, 512, 24 << 30)
    assert main(["plan", str(engine), "--gpu-memory", "500MB"]) == 1
    text = capsys.readouterr().out
    assert "It does not fit: The engine does not fit the memory of this GPU.\n" in text
    assert "    a memory of 1." in text


@pytest.mark.parametrize(
    ("more", "summary"),
    [
        (("--dtype", "bfloat16"), "A finished engine has its dtype."),
        (("--weights", "int4"), "A finished engine has its weights."),
        (("--target", "onnxruntime"), "A finished engine has its target."),
        (("--tp", "2"), "The engine was not built for this many ranks."),
        (("--memory", "8GB"), "The memory is not of the kind that the engine lies in."),
        (("--session-len", "9000"), "session_len is larger than the engine's window."),
    ],
    ids=str,
)
def test_what_contradicts_an_engine(
    engine: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, str], summary: str
) -> None:
    assert main(["plan", str(engine), "--gpu-memory", "24GiB", *more]) == 1
    said = capsys.readouterr().err
    assert summary in said and "fix:" in said


def test_a_checkpoint_is_described_by_the_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Mapping[str, str]] = []

    def described(path: str, options: Mapping[str, str], folder: Path) -> Path:
        assert path == "org/name"
        asked.append(options)
        folder.mkdir()
        (folder / MANIFEST_FILE).write_text(dump_manifest(PAGED), "utf-8")
        return folder

    monkeypatch.setattr(command, "describe_checkpoint", described)
    monkeypatch.chdir(tmp_path)
    more = ("--weights", "int4", "--session-len", "1024", "--max-batch-size", "4")
    assert main(["plan", "org/name", "--gpu-memory", "24GiB", *more]) == 0
    assert asked == [
        {
            "target": "cuda",
            "dtype": "float16",
            "weights": "int4",
            "session-len": "1024",
            "max-batch-size": "4",
        }
    ]
    assert "4 sequences at once of up to 1,024" in capsys.readouterr().out


def test_without_a_gpu_its_memory_must_be_given(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(name: str) -> None:
        raise BackendUnavailableError("none", found=f"no GPU for {name}")

    monkeypatch.setattr(command, "load_backend", none)
    values = ["plan", str(engine)]
    from vlmforge.cli import parser

    with pytest.raises(VlmforgeError, match="no GPU here") as caught:
        command.run_plan(plan_arguments.asked_of(parser().parse_args(values)))
    assert caught.value.fix == "--gpu-memory 80GiB"


@pytest.mark.parametrize("option", ["target", "dtype", "weights", "kv-dtype"])
def test_it_takes_what_a_build_takes(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    def choices(parser: argparse.ArgumentParser, *command: str) -> str:
        with pytest.raises(SystemExit):
            parser.parse_args([*command, "org/name", f"--{option}", "odd"])
        return capsys.readouterr().err.split("invalid choice:")[1]

    assert choices(vlmforge.cli.parser(), "plan") == choices(builder.parser(), "-o", "x")


def test_weights_that_are_not_too_much_are_no_proposal() -> None:
    found = plan(PAGED, EngineConfig(), 1 << 20)
    assert found.refusal is not None
    assert not any("--weights" in change for change in found.refusal.changes)
