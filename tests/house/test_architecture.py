"""`docs/architecture.md` speaks of files and names that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "runtime/vlmforge"
TEXT = (ROOT / "docs/architecture.md").read_text("utf-8")
PATHS = sorted(set(re.findall(r"[\w/]+\.(?:py|toml)\b|[\w/]+/(?=[`\s,:(])", TEXT)))
NAMES = sorted(set(re.findall(r"`([A-Z]\w+)`", TEXT)))
FUNCTIONS = sorted(set(re.findall(r"\b([a-z_]+)\(\)", TEXT)))


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 120
    assert len(PATHS) > 40


@pytest.mark.parametrize("path", PATHS)
def test_each_path_exists(path: str) -> None:
    assert (RUNTIME / path).exists() or (ROOT / path).exists()


@pytest.mark.parametrize("name", NAMES)
def test_each_class_exists(name: str) -> None:
    found = re.compile(rf"^class {name}\b", re.MULTILINE)
    assert any(found.search(path.read_text("utf-8")) for path in RUNTIME.rglob("*.py"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_exists(name: str) -> None:
    found = re.compile(rf"^ *def {name}\(", re.MULTILINE)
    assert any(found.search(path.read_text("utf-8")) for path in RUNTIME.rglob("*.py"))
