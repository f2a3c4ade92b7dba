"""A pipeline at full load for a while: does memory stay flat, and does every request end?

    python scripts/soak.py [--minutes 30] [--seed 0] [--engine ENGINE] [--results bench/RESULTS.md]

Callers send good requests of all forms without a pause, twice as many as are run at once; some of
them leave early. Memory is looked at while they do. Writes the summary into its part of RESULTS.
Status 1 for a fault, a request that is stuck (3, with the stacks of all threads), or memory that
grows: its mean over the last third above that over the second by more than a twentieth.
"""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from callers import Callers, resident_bytes
from drawn_requests import Drawing, draw_pictures
from fuzz import CHECKPOINT, MIB, ROOT
from vlmforge import EngineConfig, pipeline

MOST_GROWTH = 0.05
BEGIN, END = "<!-- soak: written by scripts/soak.py -->", "<!-- end of soak -->"


def main() -> int:
    """Soak, print and write down; the status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default=str(CHECKPOINT))
    parser.add_argument("--work", type=Path, default=ROOT / "out/fuzz", help="for the pictures")
    parser.add_argument("--callers", type=int, help="twice the engine's sequences")
    parser.add_argument("--hangs", type=float, default=300.0, help="seconds")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/RESULTS.md")
    given = parser.parse_args()
    soaked = soak(given)
    text = summary(soaked)
    print(text)
    write_part(given.results, text)
    return int(bool(soaked.faults) or soaked.growth > MOST_GROWTH)


@dataclass(frozen=True)
class Soaked:
    """What came of it. `resident`: bytes, looked at in equal distances."""

    minutes: float
    callers: int
    prompts: int
    tokens: int
    ends: Sequence[tuple[str, int]]
    faults: Sequence[str]
    resident: Sequence[int]

    @property
    def thirds(self) -> list[float]:
        """Mean of the resident bytes in each third of the time."""
        size = max(1, len(self.resident) // 3)
        parts = [self.resident[i * size : (i + 1) * size or None] for i in range(3)]
        return [sum(part) / len(part) for part in parts if part]

    @property
    def growth(self) -> float:
        """Of the last third against the second; the first fills the caches."""
        return self.thirds[-1] / self.thirds[len(self.thirds) // 2] - 1


def soak(given: argparse.Namespace) -> Soaked:
    """Send requests until the time is over."""
    given.work.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(given.work)
    with pipeline(given.engine, EngineConfig()) as pipe:
        options = pipe._engine.options
        count = given.callers or 2 * options.slots
        drawing = Drawing(given.seed, pictures, options.capacity, bad=0.0, large=0.001)
        callers = Callers(pipe, drawing, options.capacity, hangs=given.hangs)
        begun = time.monotonic()
        over = threading.Event()
        resident: list[int] = []

        def look() -> None:
            while not over.wait(max(0.5, 0.2 * given.minutes)):
                resident.append(resident_bytes())

        looking = threading.Thread(target=look)
        looking.start()
        callers.run(count, lambda: time.monotonic() - begun < 60 * given.minutes)
        minutes = (time.monotonic() - begun) / 60
        over.set()
        looking.join()
    return Soaked(
        minutes,
        count,
        callers.sent,
        callers.tokens,
        callers.outcomes.most_common(),
        callers.faults,
        resident,
    )


def summary(soaked: Soaked) -> str:
    """The part of RESULTS, as Markdown."""
    thirds = " / ".join(f"{mean / MIB:.0f}" for mean in soaked.thirds)
    ends = ", ".join(f"{count} {end}" for end, count in soaked.ends)
    rows = (
        ("minutes", f"{soaked.minutes:.1f}"),
        ("callers", f"{soaked.callers}"),
        ("prompts", f"{soaked.prompts} ({ends})"),
        ("tokens generated", f"{soaked.tokens}"),
        (
            "resident memory in each third, MiB",
            f"{thirds}, at most {max(soaked.resident) / MIB:.0f}",
        ),
        ("growth from the second third to the last", f"{soaked.growth:+.1%}"),
        ("stuck requests", "none"),
        ("faults", f"{len(soaked.faults) or 'none'}"),
    )
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def write_part(path: Path, text: str) -> None:
    """Put the summary into its part of the file, which is made if there is none."""
    whole = path.read_text("utf-8") if path.exists() else ""
    part = f"{BEGIN}\n{text}\n{END}"
    if BEGIN in whole:
        whole = re.sub(f"{BEGIN}.*?{END}", lambda _: part, whole, flags=re.DOTALL)
    else:
        heading = "## A soak at full load\n\n`make soak` (`scripts/soak.py`), the demo model:\n\n"
        whole = f"{whole.rstrip()}\n\n{heading}{part}\n"
    path.write_text(whole, "utf-8")


if __name__ == "__main__":
    sys.exit(main())
