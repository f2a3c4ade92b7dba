"""Measurements as they come: lines of JSON that a run which is cut short leaves behind.

A row says by `part` of what kind it is, and by `engine` of which; of rows that agree in both, and
in what their kind tells them apart by, the last one counts.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# What tells rows of one part apart, beside the engine.
_APART = ("case", "batch", "by")


@dataclass(frozen=True, slots=True)
class Results:
    """Where rows go; None: they are printed only."""

    file: Path | None = None

    def add(self, part: str, **values: Any) -> Row:
        """Print a row, and append it to the file."""
        row: Row = {"part": part, **values}
        print("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "at": time.strftime("%FT%TZ", time.gmtime())}) + "\n")
        return row

    def rows(self) -> list[Row]:
        """Those that count, in the order in which they first came."""
        found: dict[tuple[Any, ...], Row] = {}
        if self.file is not None and self.file.exists():
            for line in self.file.read_text("utf-8").splitlines():
                row = json.loads(line)
                key = (row["part"], row.get("engine"), *(row.get(name) for name in _APART))
                found[key] = row
        return list(found.values())

    def of(self, part: str) -> list[Row]:
        """The rows of one part."""
        return [row for row in self.rows() if row["part"] == part]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def attempt(name: str, work: Callable[[], object]) -> int:
    """Do it; 1 where it failed, which is shown and ends nothing else."""
    began = time.perf_counter()
    print(f"{name} ...", flush=True)
    try:
        work()
    except Exception:  # noqa: BLE001 - what else is measured must not be lost
        print("\n".join(traceback.format_exc().splitlines()[-12:]), flush=True)
        print(f"{name}: FAILED after {time.perf_counter() - began:.1f} s", flush=True)
        return 1
    print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return 0


def attempts(works: Iterable[tuple[str, Callable[[], object]]]) -> None:
    """Do them all, and end the process with 1 where one of them failed."""
    sys.exit(min(1, sum([attempt(name, work) for name, work in works])))


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def middle(values: Sequence[float]) -> float:
    """Their median."""
    return statistics.median(values)
