"""Nothing of a checkpoint is executed, whatever it carries and wherever it is looked at from."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import build_once
from hub_server import HubServer
from vlmforge.engine.bundle import open_bundle
from vlmforge.engine.manifest import MANIFEST_FILE
from vlmforge.errors import CheckpointError
from vlmforge_recipes.llava.synthetic import PRESETS, write_checkpoint

SMALL = PRESETS["tiny"]  # whose traces other tests have made
# What a loader with `trust_remote_code` imports, and what shadows a library in the same folder.
REMOTE = ("modeling_it.py", "configuration_it.py", "tokenization_it.py", "processing_it.py")
SHADOWS = ("torch.py", "numpy.py", "onnx.py", "json.py", "sitecustomize.py", "vlmforge.py")
AUTO_MAP = {
    "AutoConfig": "configuration_it.ItConfig",
    "AutoModel": "modeling_it.ItModel",
    "AutoModelForCausalLM": "modeling_it.ItModel",
    "AutoProcessor": "processing_it.ItProcessor",
    "AutoTokenizer": ["tokenization_it.ItTokenizer", None],
}


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return exec, (f"open({str(self.marker)!r}, 'a').write('unpickled\\n')",)


def poison(folder: Path, marker: Path) -> None:
    """Put code into a checkpoint that writes to `marker` when it is executed."""
    for name in (*REMOTE, *SHADOWS, "__init__.py"):
        text = f"open({str(marker)!r}, 'a').write({name!r} + chr(10))\n"
        (folder / name).write_text(text, "utf-8")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        values = json.loads((folder / name).read_text("utf-8"))
        values |= {"auto_map": AUTO_MAP, "trust_remote_code": True}
        (folder / name).write_text(json.dumps(values), "utf-8")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed.txt"


@pytest.fixture
def checkpoint(tmp_path: Path, marker: Path) -> Path:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL)
    poison(folder, marker)
    return folder


def run(
    arguments: Sequence[object], cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_poison_works(checkpoint: Path, marker: Path) -> None:
    done = run(["-c", "import modeling_it, torch"], checkpoint)
    assert done.returncode == 0, done.stderr
    assert {"modeling_it.py", "torch.py"} <= set(marker.read_text("utf-8").split())
    marker.unlink()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.read_text("utf-8") == "unpickled\n"


@pytest.mark.usefixtures("traces_for_children")
def test_a_pipeline_on_a_checkpoint_executes_nothing(checkpoint: Path, marker: Path) -> None:
    """In the checkpoint, and so does its child, an installed `build-engine`, in the same folder."""
    program = "from vlmforge import pipeline\nwith pipeline('.') as p: print(p('hi').finish_reason)"
    cache = marker.parent / "cache"
    done = run(["-P", "-c", program], checkpoint, VLMFORGE_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("stop", "length")
    assert not marker.exists()
    (engine,) = (path.parent for path in cache.rglob(MANIFEST_FILE))
    assert not any(path.suffix == ".py" for path in engine.rglob("*"))
    assert open_bundle(engine).manifest.provenance.source == checkpoint.name


def test_from_the_hub_code_is_not_even_fetched(
    checkpoint: Path, marker: Path, tmp_path: Path
) -> None:
    """What is not there cannot run when an engine is built of it."""
    program = (
        "from vlmforge_builder.checkpoint.source import resolve_checkpoint as get\nget('org/it')"
    )
    with HubServer({"org/it": checkpoint}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        done = run(["-c", program], tmp_path, **env)
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" in hub.downloaded()
        assert not any(name.endswith(".py") for name in hub.downloaded())
    assert not marker.exists()


def test_pickles_that_would_run_code_are_refused(tmp_path: Path, marker: Path) -> None:
    import torch

    folder = write_checkpoint(tmp_path / "checkpoint", replace(SMALL, file_format="bin"))
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, "extra": Payload(marker)}, path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        build_once(tmp_path / "it.engine", folder)
    assert not marker.exists()
    assert not (tmp_path / "it.engine").exists()
