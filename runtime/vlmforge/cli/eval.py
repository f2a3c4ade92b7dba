"""`vlmforge eval`: how many questions, about drawn pictures or the user's, are answered right?"""

from __future__ import annotations

import argparse
import sys

from vlmforge.api.load import pipeline
from vlmforge.errors import ConfigError
from vlmforge.evaluation.cases import KINDS, held_out_cases
from vlmforge.evaluation.evaluate import Report, evaluate
from vlmforge.evaluation.sheet import html_sheet

_SHEET_PICTURES = 60
_QUESTIONS = 650
_OF_DRAWN = ("seed", "sheet", "minimum")
_OF_DATA = ("match", "max_new_tokens", "results")


def run_eval(values: argparse.Namespace) -> int:
    """Print the accuracy; 1 when it is below what was asked for.

    Raises:
        ConfigError: an argument is out of range, or one of the other kind of evaluation.
    """
    _check(values)
    if values.data is None:
        return _run_drawn(values)
    from vlmforge.cli.eval_data import run_data

    return run_data(values)


def _check(values: argparse.Namespace) -> None:
    foreign = _OF_DATA if values.data is None else _OF_DRAWN
    given = [name for name in foreign if getattr(values, name) not in (None, [])]
    if given:
        raise ConfigError(
            "An option is of the other kind of evaluation.",
            found=f"--{given[0].replace('_', '-')} "
            + ("without --data" if values.data is None else "with --data"),
            expected="--data, --match, --max-new-tokens and --results for questions of your own; "
            "--seed, --sheet and --minimum for drawn pictures",
            fix="leave it out",
        )
    if values.min_accuracy is not None and not 0 <= values.min_accuracy <= 100:
        raise ConfigError(
            "A minimum is not understood.",
            found=f"--min-accuracy {values.min_accuracy}",
            expected="a percentage, 0 to 100",
            fix="--min-accuracy 90",
        )
    if values.limit is not None and values.limit < 1:
        raise ConfigError(
            "There is nothing to ask.",
            found=f"--limit {values.limit}",
            expected="a positive number",
            fix="--limit 130",
        )


def _run_drawn(values: argparse.Namespace) -> int:
    minimums = _minimums(values.minimum)
    if values.min_accuracy is not None:
        minimums["all"] = max(minimums.get("all", 0.0), values.min_accuracy / 100)
    limit = values.limit or _QUESTIONS
    print(f"drawing {limit} questions ...", file=sys.stderr, flush=True)
    cases = list(held_out_cases(limit, seed=values.seed or 0))
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
