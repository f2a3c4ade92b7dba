"""The cards of the families, against the recipes that they describe."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import vlmforge_recipes
from conftest import DATA
from vlmforge.cli import main
from vlmforge.engine.families import ModelRow, installed_families, models_table, read_card
from vlmforge.errors import CheckpointError, ConfigError
from vlmforge_builder.checkpoint.config import read_config
from vlmforge_builder.recipe import ModelSpec, RecipeOptions, find_recipe, installed_recipes

FOLDERS = sorted(path.parents[1] for path in DATA.glob("*/checkpoint/config.json"))


def no_hub(name: str) -> Path:
    raise CheckpointError(f"{name} could not be fetched.", found="no hub", expected="", fix="")


def load(folder: Path) -> tuple[str, ModelSpec]:
    checkpoint = folder / "checkpoint"
    config = read_config(checkpoint / "config.json")
    recipe = find_recipe(config)
    return recipe.name, recipe.load(checkpoint, config, RecipeOptions(None, None, no_hub))


def test_every_recipe_has_its_card() -> None:
    families = [m.name for m in pkgutil.iter_modules(vlmforge_recipes.__path__) if m.ispkg]
    cards = [card.family for card in installed_families()]
    assert cards == families == [recipe.name for recipe in installed_recipes()]
    assert all(card.rows for card in installed_families())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_cards_tell_what_recipes_make_of_the_goldens(folder: Path) -> None:
    """Templates and architectures of each golden checkpoint are in a row of its family."""
    family, spec = load(folder)
    (card,) = [card for card in installed_families() if card.family == family]

    def fits(row: ModelRow) -> bool:
        names = {spec.template.name, *spec.prompt.templates}
        return (
            f"architecture {spec.architecture}" in row.recognised_by
            and set(row.templates) == names
            and row.templates[0] == spec.template.name
        )

    assert any(fits(row) for row in card.rows), (spec.architecture, spec.template.name)


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert printed == models_table() + "\n"
    lines = printed.splitlines()
    assert len(lines) == 2 + sum(len(card.rows) for card in installed_families())
    assert len({len(line) for line in lines}) == 1
    for words in (
        "Yi-VL 6B, 34B",
        "| 1024 ",
        "Apache 2.0",
        "mm_default, yi-vl",
        "tensorrt_rtx",
        "builds",
    ):
        assert words in printed


def test_the_table_needs_no_library_of_a_build() -> None:
    program = (
        "import sys\nfrom vlmforge.cli import main\nmain(['models'])\n"
        "print(*[m for m in ('torch', 'onnx', 'numpy', 'vlmforge_builder') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "Expecting property name"),
        ("[]", "list []"),
        ('{"family": "x"}', "no key 'rows'"),
        ('{"family": "x", "rows": [], "colour": 1}', "unknown key 'colour'"),
        (json.dumps({"family": "x", "rows": [{"model": 3}]}), "no key 'layout'"),
    ],
)
def test_cards_that_are_not(text: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_card(text, "there/card.json")
    assert found in caught.value.found
    assert "there/card.json" in str(caught.value)
