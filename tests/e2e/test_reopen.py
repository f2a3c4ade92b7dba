"""A few of the cycles of load and close that `scripts/reopen.py` runs by the twenty."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import HANGS, ROOT


def test_nothing_is_left_of_a_closed_pipeline(hf_engine: Path) -> None:
    command = [sys.executable, ROOT / "scripts/reopen.py", "--cycles", "4", "--engine", hf_engine]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, timeout=HANGS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 4 cycles; 0 objects left" in done.stdout
