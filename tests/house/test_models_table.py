"""README's table of models is the one that `vlmforge models` prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from vlmforge.engine.families import models_table

ROOT = Path(__file__).parents[2]


def with_table(document: str) -> str:
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "scripts/models_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: str = module.with_table(document)
    return made


def test_readme_has_the_table() -> None:
    document = (ROOT / "README.md").read_text("utf-8")
    assert models_table() in document
    assert with_table(document) == document, "run: python scripts/models_table.py"


def test_an_old_table_is_replaced() -> None:
    document = (ROOT / "README.md").read_text("utf-8")
    old = document.replace(models_table(), "| model |\n|---|\n| old |")
    assert old != document
    assert with_table(old) == document
    with pytest.raises(AssertionError, match="no <!-- models"):
        with_table("# no markers")
