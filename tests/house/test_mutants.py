"""Faults of `make mutants` have a place in the files that they are planted in."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts/mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", module)
    spec.loader.exec_module(module)
    return module


def test_each_fault_has_one_place(mutants: ModuleType) -> None:
    texts = {m: (ROOT / m.file).read_text("utf-8") for m in mutants.MUTANTS}
    assert len(texts) > 20
    assert [m.name for m, text in texts.items() if text.count(m.old) != 1 or m.old == m.new] == []
