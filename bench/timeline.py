"""Which steps an engine ran, and a picture of them."""

from __future__ import annotations

import logging
from pathlib import Path

from vlmforge.runner.step import StepRecord

_COLOURS = {"encode": "#d95f02", "prompt": "#7570b3", "decode": "#1b9e77"}


class Steps(logging.Handler):
    """Collects what every step in the block did."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[StepRecord] = []
        self._logger = logging.getLogger("vlmforge.steps")

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what a step did."""
        if isinstance(record.args, tuple) and isinstance(record.args[0], StepRecord):
            self.records.append(record.args[0])

    def __enter__(self) -> Steps:
        self._level, self._outer = self._logger.level, self._logger.propagate
        self._logger.setLevel(logging.DEBUG)
        self._logger.propagate = False
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)
        self._logger.propagate = self._outer


def bars(records: list[StepRecord]) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """By kind of work and sequence: begin and length in seconds, from the first step's begin."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {kind: {} for kind in _COLOURS}
    origin = records[0].begun if records else 0.0
    for record in records:
        begin = record.begun - origin
        if (prompt := record.step.prefill) is not None:
            if record.images:
                found["encode"].setdefault(prompt.sequence, []).append((begin, record.encode))
            begin += record.encode
            for row in record.step.prompts:
                found["prompt"].setdefault(row.sequence, []).append((begin, record.prompt))
            begin += record.prompt
        for row in record.step.decode:
            found["decode"].setdefault(row.sequence, []).append((begin, record.decode))
    return found


def draw(path: Path, steps: Steps) -> None:
    """A line for each sequence, a bar for each piece of work; all in one column are one step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = bars(steps.records)
    names = sorted({name for kind in found.values() for name in kind})
    figure, axes = plt.subplots(figsize=(11, 3.2), dpi=90)
    for kind, colour in _COLOURS.items():
        for name, pieces in found[kind].items():
            height = names.index(name)
            axes.broken_barh(pieces, (height - 0.4, 0.8), color=colour, edgecolor="white", lw=0.3)
        axes.bar(0, 0, color=colour, label={"prompt": "a part of a prompt"}.get(kind, kind))
    axes.set_yticks(range(len(names)), [f"request {index + 1}" for index in range(len(names))])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.16), frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
