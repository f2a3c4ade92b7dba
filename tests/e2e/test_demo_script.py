"""`make demo`: what `scripts/demo.py` draws, asks and prints is what README shows."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, build_once
from vlmforge_recipes.llava.demo import CHECKPOINT


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """`scripts/demo.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module("demo")


def test_readme_shows_the_pictures_that_the_demo_draws(demo: ModuleType) -> None:
    for name, picture in zip(("first", "second"), demo.pictures(), strict=True):
        shown = np.asarray(Image.open(ROOT / "docs" / f"demo_{name}.png"))
        assert np.array_equal(shown, np.asarray(picture))
    assert all(scene.held_out for scene in demo.SCENES)


def in_readme() -> str:
    """What it shows of the demo's output."""
    readme = (ROOT / "README.md").read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(readme) if line.startswith(">>> pipe(('Describe"))
    return "\n".join(readme[start : readme.index("```", start)])


def test_the_demo_prints_what_readme_shows(
    demo: ModuleType,
    shared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the engine of the other tests in place of the one that its command would build."""

    def run(command: list[object], check: bool) -> subprocess.CompletedProcess[str]:
        builder, *arguments = command
        assert os.access(str(builder), os.X_OK)
        assert arguments == [CHECKPOINT, "-o", tmp_path / "engine", "--force"]
        shutil.copytree(build_once(shared / "demo.engine", CHECKPOINT), tmp_path / "engine")
        return subprocess.CompletedProcess("build-engine", returncode=0)

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run))
    assert demo.main(tmp_path) == 0
    printed = capsys.readouterr()
    assert in_readme() in printed.out, printed.err


@pytest.mark.nightly
def test_the_demo_as_a_program_prints_what_readme_shows(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/demo.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert in_readme() in done.stdout
