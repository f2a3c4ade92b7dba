"""Accuracy of the demo model in every precision, as a table: `python scripts/precision.py WORK`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vlmforge import pipeline
from vlmforge.evaluation.cases import held_out_cases
from vlmforge.evaluation.evaluate import Report, evaluate
from vlmforge_recipes.llava.demo import CHECKPOINT

DTYPES = ("float32", "float16", "bfloat16")
QUANTISED = ("int8", "int4")
LIMIT = 2600


def main(work: Path) -> None:
    """Build an engine of each precision, ask each the same questions, print the table."""
    work.mkdir(parents=True, exist_ok=True)
    cases = list(held_out_cases(LIMIT))
    reports = {}
    options = {name: ("--dtype", name) for name in DTYPES}
    options |= {name: ("--weights", name) for name in QUANTISED}
    for name, chosen in options.items():
        engine = work / name
        builder = Path(sys.executable).with_name("build-engine")
        subprocess.run([builder, CHECKPOINT, "-o", engine, *chosen, "--force"], check=True)
        with pipeline(str(engine)) as pipe:
            reports[name] = evaluate(pipe, cases, lambda done, total: None)
        print(f"{name}: asked {LIMIT}", file=sys.stderr, flush=True)
    print(table(reports))


def table(reports: dict[str, Report]) -> str:
    """One row for each kind, one column for each precision, with 95 % confidence intervals."""
    lines = ["| kind | asked | " + " | ".join(reports) + " |", "|---|---|" + "---|" * len(reports)]
    columns = [(*report.scores, report.overall) for report in reports.values()]
    for scores in zip(*columns, strict=True):
        cells = []
        for score in scores:
            low, high = score.interval
            cells.append(f"{score.accuracy:.1%} ({low:.1%} to {high:.1%})")
        lines.append(f"| {scores[0].kind} | {scores[0].count} | {' | '.join(cells)} |")
    rates = (f"{report.generated_tokens / report.seconds:.0f}" for report in reports.values())
    lines.append(f"| tokens/s | | {' | '.join(rates)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
