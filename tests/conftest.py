"""What tests share: engines built once for a run, and a pipeline's environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data"
IMAGES = DATA / "images"
HF = DATA / "llava_1_5_hf"
ORIGINAL = DATA / "llava_v1_5_liuhaotian"

Builder = Callable[..., Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share, and no other run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(autouse=True, scope="session")
def _private_cache(shared: Path) -> Iterator[None]:
    """Nothing that tests build or remember goes to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMFORGE_CACHE", str(shared / "cache"))
        yield


def run_build(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`build-engine` in a process of its own."""
    command = [sys.executable, "-m", "vlmforge_builder", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def build_once(engine: Path, *arguments: object) -> Path:
    """Build unless another worker of this run did."""
    with FileLock(f"{engine}.lock"):
        if not engine.exists():
            done = run_build(*arguments, "-o", engine)
            assert done.returncode == 0, done.stderr
    return engine


# Engines of golden checkpoints whose window is not what the model was trained for.
_GOLDEN_OPTIONS: Mapping[str, tuple[object, ...]] = {HF.name: ("--session-len", 1024)}


def golden_engine(shared: Path, name: str) -> Path:
    """The float32 engine of the golden checkpoint `name` of `tests/data`, built once for a run."""
    options = _GOLDEN_OPTIONS.get(name, ())
    return build_once(shared / f"{name}.engine", DATA / name / "checkpoint", *options)


@pytest.fixture(scope="session")
def hf_engine(shared: Path) -> Path:
    """The engine of the golden checkpoint in the layout of transformers."""
    return golden_engine(shared, HF.name)


@pytest.fixture(scope="session")
def original_engine(shared: Path) -> Path:
    """The engine of the golden checkpoint in the original layout."""
    return golden_engine(shared, ORIGINAL.name)
