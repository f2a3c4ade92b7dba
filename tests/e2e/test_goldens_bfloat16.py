"""Engines of bfloat16 weights meet the goldens' tolerances for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden_models import FOLDERS, check_16_bit_engine


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_stage(folder: str, tmp_path: Path) -> None:
    check_16_bit_engine(folder, "bfloat16", tmp_path / "engine")
