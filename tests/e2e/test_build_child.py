"""`pipeline(CHECKPOINT)` is killed while its child builds: nothing goes on, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from conftest import DATA, HANGS

CHECKPOINT = DATA / "yi_vl" / "checkpoint"


@pytest.mark.usefixtures("builds_that_stand_still")
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_the_build_ends_with_the_pipeline(tmp_path: Path, death: signal.Signals) -> None:
    program = "import sys; from vlmforge import pipeline; pipeline(sys.argv[1])"
    with subprocess.Popen(
        [sys.executable, "-c", program, CHECKPOINT],
        env={**os.environ, "VLMFORGE_CACHE": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    ) as caller:
        assert caller.stderr is not None
        for line in caller.stderr:
            if line.rstrip().endswith("] trace vision"):
                break
        (staged,) = (p for p in (tmp_path / "engines").iterdir() if p.is_dir())
        caller.send_signal(death)
    lock = Path(f"{str(staged).partition('.building-')[0]}.building.lock")
    with FileLock(lock).acquire(timeout=HANGS):  # which the living child has
        assert [p for p in (tmp_path / "engines").iterdir() if p.is_dir()] == []
