"""Write the tables of docs/checkpoints.md, between its markers, from those of the recipes.

python scripts/checkpoint_keys.py
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import vlmforge_recipes
from vlmforge_builder.checkpoint.keys import Fate, Key, KeyTable

DOCUMENT = Path(__file__).parents[1] / "docs/checkpoints.md"
BEGIN = "<!-- keys: written by scripts/checkpoint_keys.py -->\n"
END = "<!-- end of keys -->\n"
_ORDER = (Fate.HONOURED, Fate.REFUSED, Fate.UNUSED)


def layouts() -> dict[str, tuple[KeyTable, ...]]:
    """The tables of every family of this repository, by layout."""
    found: dict[str, tuple[KeyTable, ...]] = {}
    for module in pkgutil.iter_modules(vlmforge_recipes.__path__):
        if module.ispkg:
            keys = importlib.import_module(f"vlmforge_recipes.{module.name}.keys")
            found |= keys.DOCUMENTED
    return found


def with_tables(document: str) -> str:
    """The document with the tables in place of what is between the markers."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"no {BEGIN.strip()} ... {END.strip()}"
    return f"{before}{BEGIN}\n{tables(layouts())}\n{END}{after}"


def tables(by_layout: Mapping[str, Sequence[KeyTable]]) -> str:
    """All tables; those that are equal in several layouts once."""
    merged: list[tuple[KeyTable, list[str]]] = []
    for layout, found in by_layout.items():
        for table in found:
            names = next((names for other, names in merged if other == table), None)
            if names is None:
                merged.append((table, [layout]))
            else:
                names.append(layout)
    merged.sort(key=lambda pair: (pair[0].file, pair[0].when, pair[0].place))
    return "\n".join(_section(table, names) for table, names in merged)


def _section(table: KeyTable, names: Sequence[str]) -> str:
    title = " ".join([f"`{table.file}`", *([f"`{table.place}`"] if table.place else [])])
    lines = [f"### {title}{f' {table.when}' if table.when else ''}", ""]
    lines += [f"Of: {'; '.join(names)}.", "", "| keys | what a build does | |", "|---|---|---|"]
    return "\n".join([*lines, *_rows(table), ""])


def _rows(table: KeyTable) -> list[str]:
    known: dict[str, Key] = {}
    for key in table.keys:
        known.setdefault(key.name, key)  # as `KeyTable.find`: the first counts
    rows: dict[tuple[int, str, str], list[str]] = {}
    for name, key in known.items():
        place = (_ORDER.index(key.fate), _fate(key), key.note)
        rows.setdefault(place, []).append(f"`{name}`")
    ordered = sorted(rows, key=lambda row: row[0])
    return [f"| {', '.join(rows[row])} | {row[1]} | {row[2]} |" for row in ordered]


def _fate(key: Key) -> str:
    if key.fate is not Fate.REFUSED or not key.admitted:
        return key.fate.value
    values = " or ".join(f"`{json.dumps(value)}`" for value in key.admitted)
    return f"{key.fate.value} unless {values}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text("utf-8")), "utf-8")
