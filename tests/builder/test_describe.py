"""An engine described is the engine built: its plan before is its plan after, and its load."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from conftest import HF, cuda_engine, golden_engine
from hub_server import HubServer
from vlmforge import EngineConfig, pipeline
from vlmforge.api.plan import CONTEXT_BYTES, plan
from vlmforge.backends.fake import HostBackend, cuda_on_cpu
from vlmforge.engine.manifest import Manifest, load_manifest
from vlmforge.errors import BuildError
from vlmforge.limits import Room
from vlmforge_builder.build import BuildOptions
from vlmforge_builder.checkpoint.safetensors_file import read_safetensors
from vlmforge_builder.checkpoint.safetensors_outline import Entry, write_outline
from vlmforge_builder.describe import write_description
from vlmforge_builder.progress import Progress

MEMORY = 1 << 31


def hollow(into: Path) -> Path:
    """The golden checkpoint with holes in the place of its weights."""
    folder = into / "checkpoint"
    shutil.copytree(HF / "checkpoint", folder)
    for path in folder.glob("*.safetensors"):
        write_outline(path, entries(path))
    return folder


def entries(path: Path) -> dict[str, Entry]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: (item["dtype"], item["shape"], item["data_offsets"])
        for name, item in header.items()
        if name != "__metadata__"
    }


def test_an_outline_tells_what_the_file_tells(tmp_path: Path) -> None:
    path = min((HF / "checkpoint").glob("*.safetensors"))
    write_outline(tmp_path / "outline.safetensors", entries(path))
    found, real = read_safetensors(tmp_path / "outline.safetensors"), read_safetensors(path)
    assert {
        name: dataclasses.replace(tensor.info, file=path) for name, tensor in found.items()
    } == {name: tensor.info for name, tensor in real.items()}
    assert (tmp_path / "outline.safetensors").stat().st_blocks * 512 < path.stat().st_size / 4
    write_outline(tmp_path / "empty.safetensors", {})
    assert read_safetensors(tmp_path / "empty.safetensors") == {}


def described(folder: Path, into: Path, **options: object) -> Manifest:
    made = BuildOptions(str(folder), into, session_len=1024, **options)  # type: ignore[arg-type]
    with Progress(text=io.StringIO()) as progress:
        return load_manifest(write_description(made, progress))


def bare(manifest: Manifest) -> Manifest:
    """What a description has: no files, no kernels, and another day."""
    parts = []
    for part in manifest.parts:
        empty = {"kernels": {}, "activations": {}, "choosers": {}}
        sets = () if part.chain is None else [getattr(part.chain, name) for name in empty]
        kernels = {name for files in sets for name in files.values()}
        chain = None if part.chain is None else structs.replace(part.chain, **empty)
        data = tuple(name for name in part.data if name not in kernels)
        parts.append(structs.replace(part, chain=chain, data=data))
    options = {k: v for k, v in manifest.provenance.options.items() if k != "skip_goldens"}
    provenance = structs.replace(
        manifest.provenance, built_at="", source_fingerprint="", options=options
    )
    return structs.replace(manifest, parts=tuple(parts), files=(), provenance=provenance)


@pytest.mark.parametrize("weights", [None, "int4"])
def test_the_plan_of_a_checkpoint_is_that_of_its_engine_and_of_its_load(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str | None
) -> None:
    folder = hollow(tmp_path)
    found = described(folder, tmp_path / "d", target="cuda", dtype="float16", weights=weights)
    engine = cuda_engine(shared, HF.name, *(("--weights", weights) if weights else ()))
    assert bare(found) == bare(load_manifest(engine))
    config = EngineConfig(max_batch_size=3)
    planned = plan(found, config, MEMORY)
    assert planned == plan(load_manifest(engine), config, MEMORY)
    free = Room(MEMORY - CONTEXT_BYTES, "a test")
    monkeypatch.setattr(HostBackend, "memory", lambda backend, devices: free)
    with cuda_on_cpu(), pipeline(engine, config) as pipe:
        options = pipe._engine.options
    assert planned.cache is not None
    assert (planned.cache.blocks, planned.cache.sequences) == (options.blocks, options.slots)


def test_of_a_processors_engine_too(shared: Path, tmp_path: Path) -> None:
    found = described(HF / "checkpoint", tmp_path / "d")
    engine = load_manifest(golden_engine(shared, HF.name))
    assert bare(found) == bare(engine)
    assert plan(found, EngineConfig(), 1 << 30) == plan(engine, EngineConfig(), 1 << 30)


def test_an_engine_is_not_described_over(shared: Path) -> None:
    engine = golden_engine(shared, HF.name)
    with pytest.raises(BuildError, match="is an engine already"):
        described(HF / "checkpoint", engine)


@pytest.mark.nightly
def test_of_a_hub_id_no_weights_are_fetched(tmp_path: Path) -> None:
    with HubServer({"org/name": HF / "checkpoint"}) as hub:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
        }
        command = [sys.executable, "-m", "vlmforge.cli", "plan", "org/name", "--json"]
        done = subprocess.run(
            [*command, "--gpu-memory", "24GiB"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
    kept = list((tmp_path / "home").rglob("*.safetensors"))
    assert kept == []
