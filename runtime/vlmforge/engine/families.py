"""The table of model families: what each can be given as, and what is known of it.

The facts are data of the installed families: a `card.json` in each one's folder. Reading them
imports no family, so the table is there where the libraries of a build are not.
"""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from importlib.resources import files

from msgspec import Struct

from vlmforge.engine.schema import from_json
from vlmforge.errors import ConfigError, EngineFormatError

ENTRY_POINT_GROUP = "vlmforge.recipes"
CARD_FILE = "card.json"


class Targets(Struct, frozen=True):
    """For each target: "yes", "builds" (not run yet), or "untested" (the same code, never run)."""

    onnxruntime: str
    cuda: str
    tensorrt: str
    tensorrt_rtx: str


class ModelRow(Struct, frozen=True):
    """One published layout of one model.

    Attributes:
        model: What it is called, with its sizes.
        layout: Name of the layout.
        recognised_by: What in config.json tells it from others.
        published: Ids on the hub.
        templates: Names of its chat templates; the first is the default.
        tokens_per_image: A number, or how it follows from the image's size.
        licence: Of the published weights.
        targets: What it can be built for.
    """

    model: str
    layout: str
    recognised_by: str
    published: tuple[str, ...]
    templates: tuple[str, ...]
    tokens_per_image: str
    licence: str
    targets: Targets


class FamilyCard(Struct, frozen=True):
    """What a family's `card.json` holds; `family` is the name of its recipe."""

    family: str
    rows: tuple[ModelRow, ...]


def installed_families() -> tuple[FamilyCard, ...]:
    """The cards of the packages that are registered as entry points, in the order of their names.

    Raises:
        ConfigError: a card is not of this form.
    """
    found = []
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        # The package itself is empty; its sub-packages, which need a build's libraries, are not
        # imported.
        for folder in sorted(files(entry.load()).iterdir(), key=lambda f: f.name):
            card = folder / CARD_FILE
            if card.is_file():
                found.append(read_card(card.read_text("utf-8"), str(card)))
    return tuple(found)


def read_card(text: str, where: str) -> FamilyCard:
    """A card from the text of its file `where` (ConfigError when it is not of this form)."""
    try:
        return from_json(FamilyCard, json.loads(text), where)
    except (ValueError, RecursionError) as error:
        raise _bad_card(where, str(error), "JSON") from error
    except EngineFormatError as error:
        raise _bad_card(error.summary.split(" is not ")[0], error.found, error.expected) from error


def _bad_card(where: str, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"{where} is not what a family's card holds.",
        found=found,
        expected=expected,
        fix="correct it as vlmforge.engine.families.FamilyCard describes, or reinstall its package",
    )


def supported() -> str:
    """Models and how they are recognised, for the message that refuses others."""
    rows = [row for card in installed_families() for row in card.rows]
    return "; ".join(f"{row.model} ({row.recognised_by})" for row in rows)


def models_table() -> str:
    """The table of `vlmforge models`, in Markdown that reads as text too."""
    rows = [_HEAD, *(_cells(row) for card in installed_families() for row in card.rows)]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(_HEAD))]
    lines = [
        "| " + " | ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)) + " |"
        for cells in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


_HEAD = (
    *("model", "layout", "published as", "templates (default first)", "tokens per image"),
    *("licence of the weights", "onnxruntime", "cuda", "tensorrt", "tensorrt_rtx"),
)


def _cells(row: ModelRow) -> tuple[str, ...]:
    return (
        *(row.model, row.layout, ", ".join(row.published), ", ".join(row.templates)),
        *(row.tokens_per_image, row.licence),
        *(row.targets.onnxruntime, row.targets.cuda),
        *(row.targets.tensorrt, row.targets.tensorrt_rtx),
    )
