"""`vlmforge eval ENGINE --data FILE.jsonl`: the user's own questions."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from vlmforge.api.load import pipeline
from vlmforge.errors import ConfigError
from vlmforge.evaluation.ask import MATCHES, Judged, ask
from vlmforge.evaluation.dataset import read_questions
from vlmforge.evaluation.evaluate import MAX_NEW_TOKENS
from vlmforge.evaluation.score import wilson


def run_data(values: argparse.Namespace) -> int:
    """Print the accuracy; 1 when it is below `--min-accuracy`.

    Raises:
        ConfigError: the file, or an argument, cannot be used; nothing was asked.
    """
    questions = read_questions(values.data)[: values.limit]
    tokens = MAX_NEW_TOKENS if values.max_new_tokens is None else values.max_new_tokens
    found: list[Judged] = []
    with _results(values.results) as results, pipeline(values.engine) as pipe:
        for group in ask(pipe, questions, max_new_tokens=tokens):
            found += group
            if results is not None:
                for judged in group:
                    print(json.dumps(judged.row(), ensure_ascii=False), file=results, flush=True)
            print(f"asked {len(found)} of {len(questions)}", file=sys.stderr, flush=True)
    print(_table(found))
    if values.results is not None:
        print(f"results: {values.results}")
    return _gate(found, values.match or next(iter(MATCHES)), values.min_accuracy)


@contextlib.contextmanager
def _results(path: Path | None) -> Iterator[TextIO | None]:
    """The file of results, opened before an engine is loaded; lines come one by one, whole."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be written.",
            found=getattr(error, "strerror", None) or str(error),
            expected="a path in a folder that can be written to",
            fix="--results results.jsonl",
        ) from error
    with file:
        yield file


def _table(found: Sequence[Judged]) -> str:
    lines = [f"{'match':10} {'asked':>6} {'right':>7}   95 % interval"]
    for name in MATCHES:
        right = sum(judged.matches[name] for judged in found)
        low, high = wilson(right, len(found))
        share = right / len(found)
        lines.append(f"{name:10} {len(found):6} {share:7.1%}   {low:.1%} to {high:.1%}")
    failed = [judged for judged in found if judged.error is not None]
    if failed:
        lines.append(f"{len(failed)} could not be asked, and count as wrong. The first:")
        lines.append(f"line {failed[0].question.line}: {failed[0].error}")
    return "\n".join(lines)


def _gate(found: Sequence[Judged], match: str, minimum: float | None) -> int:
    accuracy = sum(judged.matches[match] for judged in found) / len(found)
    if minimum is None or accuracy >= minimum / 100:
        return 0
    print(f"FAIL {match}: {accuracy:.1%}, needed {minimum:.1f}%", file=sys.stderr)
    return 1
