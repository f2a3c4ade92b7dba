"""`vlmforge eval`: how many questions about held-out drawn pictures does an engine answer right?"""

from __future__ import annotations

import argparse
import sys

from vlmforge.api.load import pipeline
from vlmforge.errors import ConfigError
from vlmforge.evaluation.cases import KINDS, held_out_cases
from vlmforge.evaluation.evaluate import Report, evaluate
from vlmforge.evaluation.sheet import html_sheet

_SHEET_PICTURES = 60


def run_eval(values: argparse.Namespace) -> int:
    """Print accuracy by kind; 1 when a `--minimum` is not reached (ConfigError: a wrong one)."""
    minimums = _minimums(values.minimum)
    if values.limit < 1:
        raise ConfigError(
            "There is nothing to ask.",
            found=f"--limit {values.limit}",
            expected="a positive number",
            fix="--limit 130",
        )
    print(f"drawing {values.limit} questions ...", file=sys.stderr, flush=True)
    cases = list(held_out_cases(values.limit, seed=values.seed))
    with pipeline(values.engine) as pipe:
        report = evaluate(pipe, cases, _tell)
    print(_table(report))
    if values.sheet is not None:
        page = html_sheet(report, f"vlmforge eval {values.engine}", limit=_SHEET_PICTURES)
        values.sheet.write_text(page, "utf-8")
        print(f"picture sheet: {values.sheet}")
    return _gate(report, minimums)


def _minimums(given: list[str]) -> dict[str, float]:
    found = {}
    for item in given:
        kind, _, percent = item.partition("=")
        try:
            found[kind] = float(percent) / 100
        except ValueError:
            found[kind] = -1.0
        if kind not in (*KINDS, "all") or not 0 <= found[kind] <= 1:
            raise ConfigError(
                "A minimum is not understood.",
                found=f"--minimum {item}",
                expected="KIND=PERCENT, where KIND is one of: " + ", ".join((*KINDS, "all")),
                fix="--minimum color=95",
            )
    return found


def _tell(done: int, total: int) -> None:
    print(f"asked {done} of {total}", file=sys.stderr, flush=True)


def _table(report: Report) -> str:
    lines = [f"{'kind':12} {'asked':>6} {'right':>7}   {'95 % interval':17} {'word for word':>13}"]
    for score in (*report.scores, report.overall):
        low, high = score.interval
        lines.append(
            f"{score.kind:12} {score.count:6} {score.accuracy:7.1%}   "
            f"{f'{low:.1%} to {high:.1%}':17} {score.exact / score.count:13.1%}"
        )
    rate = report.generated_tokens / report.seconds
    lines.append(
        f"{report.generated_tokens} tokens in {report.seconds:.1f} s: {rate:.0f} tokens/s, "
        "pictures and prompts included"
    )
    return "\n".join(lines)


def _gate(report: Report, minimums: dict[str, float]) -> int:
    scores = {score.kind: score for score in (*report.scores, report.overall)}
    failed = 0
    for kind, minimum in minimums.items():
        score = scores.get(kind)
        if score is None:
            print(f"FAIL {kind}: was not asked; raise --limit", file=sys.stderr)
            failed += 1
        elif score.accuracy < minimum:
            print(f"FAIL {kind}: {score.accuracy:.1%}, needed {minimum:.1%}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0
