"""The wheel holds what a deployment needs, and no weights."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vlmforge_recipes.llava.demo import CHECKPOINT

ROOT = Path(__file__).parents[2]
TOPS = {
    "runtime": "vlmforge",
    "builder": "vlmforge_builder",
    "plugins_cuda": "vlmforge_plugins",
    "recipes": "vlmforge_recipes",
}
WEIGHTS = (".safetensors", ".bin", ".model", ".onnx", ".npz", ".pt", ".pth")


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Names and sizes of the wheel's files."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        return {member.filename: member.file_size for member in archive.infolist()}


def test_it_has_no_weights(members: dict[str, int]) -> None:
    assert [name for name in members if name.endswith(WEIGHTS)] == []
    assert [name for name in members if "checkpoint/" in name and "_builder/" not in name] == []
    assert max(members.values()) < 100_000


def test_it_has_what_the_packages_need(members: dict[str, int]) -> None:
    tops = {name.split("/")[0] for name in members if ".dist-info/" not in name}
    assert tops == set(TOPS.values())
    assert {f"{package}/py.typed" for package in TOPS.values()} <= members.keys()
    needed = {
        path.relative_to(ROOT / top).as_posix()
        for top, package in TOPS.items()
        for path in (ROOT / top / package).rglob("*")
        if "__pycache__" not in path.parts and not path.is_relative_to(CHECKPOINT)
        if path.is_file()
    }
    assert len(needed) > 200
    assert needed <= members.keys()
