"""Engines of bfloat16 weights meet the goldens' tolerances for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden_models import FOLDERS, TWINS, check_16_bit_engine


# Of every architecture one in `make test`.
@pytest.mark.parametrize(
    "folder",
    [pytest.param(name, marks=[pytest.mark.nightly] * (name in TWINS)) for name in FOLDERS],
)
def test_every_stage(folder: str, tmp_path: Path) -> None:
    check_16_bit_engine(folder, "bfloat16", tmp_path / "engine")
