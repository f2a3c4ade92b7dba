"""The loss curve of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure


class Losses(Protocol):
    """What one row of the log tells."""

    @property
    def step(self) -> int:
        """Steps done."""

    @property
    def words(self) -> float:
        """Cross entropy of an answer's token."""

    @property
    def patches(self) -> float:
        """Cross entropy of a patch."""


def plot_losses(rows: Sequence[Losses], path: Path) -> None:
    """Both losses over the steps, as a PNG."""
    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    steps = [row.step for row in rows]
    axes.semilogy(steps, [row.words for row in rows], label="answers (per token)")
    axes.semilogy(steps, [row.patches for row in rows], label="patches (sum of four)", alpha=0.6)
    axes.set(xlabel="step", ylabel="cross entropy, nats")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path)
