"""Is anything slower than it was? This tree against an earlier commit, side by side.

    python bench/before.py 058addf --checkpoints out/bench/1b.checkpoint --work out/bench

All are asked the same, one right after the other; of each case, they begin in turn. Shown are
medians, and the median of the rounds' ratios with the quarters around it. `--again` asks the
earlier commit a second time, in a process of its own: how far two processes of the same program are
apart. All use the packages that are installed here and load the same engines: those that the
earlier commit builds of `--checkpoints`, or `--engines` that both can read. The texts of their
answers are compared too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from child import Child
from new_image import saved_image

ROOT = Path(__file__).parent.parent
# ONNX Runtime's threads may look for work for 60 ms behind a step: of one side, beside the other.
_QUIET_S = 0.1
PACKAGES = ("runtime", "builder", "plugins_cuda", "recipes")


@dataclass(frozen=True, slots=True)
class Case:
    """A burst: so many prompts at once, with a new image each time or without one.

    With `twice`, as many others are asked behind it, for twice the tokens.
    """

    name: str
    measure: str
    prompts: int
    tokens: int
    image: bool = False
    twice: bool = False

    @property
    def question(self) -> tuple[int, int, bool, bool]:
        """What is asked; cases that are alike in it are measured of the same answers."""
        return self.prompts, self.tokens, self.image, self.twice


def cases(tokens: int) -> tuple[Case, ...]:
    """What is asked; `tokens` of each answer that is long."""
    return (
        Case("first token, text (ms)", "first", 1, 1),
        Case("first token, a new image (ms)", "first", 1, tokens, image=True),
        Case("a decoding step behind it (ms)", "step", 1, tokens, image=True),
        Case("a decoding step of 1 (ms)", "step", 1, tokens),
        Case("first tokens of 8 (ms)", "first", 8, tokens, twice=True),
        Case("between two tokens of 8 (ms)", "step", 8, tokens, twice=True),
        Case("a decoding step of 8 (ms)", "together", 8, tokens, twice=True),
        Case("8 prompts to the last one's end (ms)", "wall", 8, tokens, twice=True),
        Case("processor time of those 8 (ms)", "cpu", 8, tokens, twice=True),
    )


def at_commit(commit: str, work: Path) -> Path:
    """The files of a commit, in a folder of their own."""
    folder = work / f"at-{commit}"
    if not folder.exists():
        folder.mkdir(parents=True)
        files = subprocess.run(
            ["git", "-C", ROOT, "archive", commit], check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=files.stdout, check=True)
    return folder


def sources(tree: Path) -> tuple[Path, ...]:
    """Where the packages of a tree are."""
    return tuple((tree / package).resolve() for package in PACKAGES)


def built(tree: Path, checkpoint: Path, work: Path) -> Path:
    """The engine that a tree's own builder makes of a checkpoint, unless it is there."""
    engine = work / f"{checkpoint.name}.{tree.name}.engine"
    program = "import sys; from vlmforge_builder.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sources(tree)))}
    command = [sys.executable, "-c", program, checkpoint, "-o", engine]
    subprocess.run(command, check=True, env=environment)
    return engine


class Sides:
    """Each version with an engine, in a process of its own."""

    def __init__(self, trees: Sequence[Path], engine: Path, threads: int, work: Path) -> None:
        self._trees, self._arguments, self._work = trees, (engine, threads), work
        self._children = [self._child(tree) for tree in self._trees]
        self._asked = 0

    def _child(self, tree: Path) -> Child:
        return Child("burst.py", *self._arguments, sources=sources(tree))

    def _turns(self, first: int) -> list[int]:
        """Everybody's turn; `first`: who begins, counted on for ever."""
        return [(first + index) % len(self._trees) for index in range(len(self._trees))]

    def load(self, first: int) -> dict[str, tuple[float, ...]]:
        """How long each takes to load: one more process, beside those that are there.

        And from the process's beginning until then.
        """
        found = {}
        for index in self._turns(first):
            begin = time.perf_counter()
            child = self._child(self._trees[index])
            found[index] = child.hello["load"], (time.perf_counter() - begin) * 1e3
            child.close()
        loads = zip(*(found[index] for index in range(len(found))), strict=True)
        return dict(zip(("load (ms)", "a process until then (ms)"), loads, strict=True))

    def ask(self, case: Case, first: int) -> list[dict[str, Any]]:
        """What each took for the same prompts, which nobody has seen; `first`: who begins."""
        texts = []
        for _ in range(1 + case.twice):
            self._asked += 1
            texts += [f"{self._asked}.{i}: what is shown here?" for i in range(case.prompts)]
        image = str(saved_image(self._work, self._asked)) if case.image else None
        question = {
            "prompts": texts,
            "image": image,
            "tokens": case.tokens,
            "twice": case.twice,
        }
        found = {index: self._alone(index, question) for index in self._turns(first)}
        if len({answer["text"] for answer in found.values()}) > 1:
            print(f"the answers to {question} differ", file=sys.stderr)
        return [found[index] for index in range(len(found))]

    def _alone(self, index: int, question: Mapping[str, object]) -> dict[str, Any]:
        time.sleep(_QUIET_S)
        return self._children[index].ask(question)

    def close(self) -> None:
        """End all."""
        for child in self._children:
            child.close()


def measure(
    sides: Sides, rounds: int, loads: int, tokens: int
) -> dict[str, list[tuple[float, ...]]]:
    """Each side's figures of each round, by the name of what was measured."""
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    asked: dict[tuple[int, int, bool, bool], list[Case]] = defaultdict(list)
    for case in cases(tokens):
        asked[case.question].append(case)
    begun = time.monotonic()
    for index in range(rounds + 1):
        if index:
            left = (time.monotonic() - begun) / index * (rounds + 1 - index)
            print(f"round {index} of {rounds}; {left:.0f} s left", file=sys.stderr, flush=True)
        for alike in asked.values():
            # Of one case, each begins in turn: who ran last has the processors' caches.
            answers = sides.ask(alike[0], index)
            for case in alike if index else ():  # the first round warms up
                found[case.name].append(tuple(answer[case.measure] for answer in answers))
    for index in range(loads):
        for name, times in sides.load(index).items():
            found[name].append(times)
    return found


def compared(before: Sequence[float], other: Sequence[float]) -> list[str]:
    """The median of the ratios, and the quarters around it.

    Where a figure is a difference of two, a round may have none.
    """
    pairs = zip(before, other, strict=True)
    ratios = [first / second for first, second in pairs if first > 0 and second > 0]
    if len(ratios) < 2:
        return [*(f"{ratio:.2f}x" for ratio in ratios), "-", "-"][:2]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [f"{middle:.2f}x", f"{low:.2f} to {high:.2f}"]


def report(engine: Path, found: dict[str, list[tuple[float, ...]]], commit: str) -> str:
    """The table of an engine; a ratio above 1 says that this tree is faster."""
    again = any(len(figures) > 2 for rounds in found.values() for figures in rounds)
    head = [str(engine), commit, "now", "before / now", "quarters"]
    if again:
        head += ["before / before again", "quarters"]
    rows = [head, ["---"] * len(head)]
    for name, rounds in found.items():
        if rounds:
            before, *others = zip(*rounds, strict=True)
            medians = [f"{statistics.median(side):.2f}" for side in (before, others[0])]
            rows.append([name, *medians, *(x for side in others for x in compared(before, side))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(given: Sequence[str] | None = None) -> None:
    """Measure each engine and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("commit")
    arguments.add_argument("--checkpoints", nargs="+", type=Path, default=[])
    arguments.add_argument("--engines", nargs="+", type=Path, default=[])
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--loads", type=int, default=3)
    arguments.add_argument("--tokens", type=int, default=33)
    arguments.add_argument("--again", action="store_true", help="the earlier commit twice")
    arguments.add_argument("--threads", type=int, default=0, help="of arithmetic; 0: as usual")
    values = arguments.parse_args(given)
    tree = at_commit(values.commit, values.work)
    made = [built(tree, checkpoint, values.work) for checkpoint in values.checkpoints]
    for engine in (*values.engines, *made):
        trees = [tree, ROOT, *[tree] * values.again]
        sides = Sides(trees, engine, values.threads, values.work)
        found = measure(sides, values.rounds, values.loads, values.tokens)
        sides.close()
        print(f"\n{report(engine, found, values.commit)}", flush=True)


if __name__ == "__main__":
    main()
