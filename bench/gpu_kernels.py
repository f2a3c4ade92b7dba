"""Where the time of a step goes, kernel by kernel: what the GPU itself says of a step of decoding.

    python3 bench/gpu_kernels.py ENGINE --batch 1:1024 64:1024

By torch's profiler (CUPTI), in the process of the pipeline; of an engine of several ranks it is the
first rank's GPU. Shown are medians over whole steps: how often a kernel runs in one, its time, and
the gaps in which nothing runs. Tracing itself costs a little: compare shares, not sums.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_results import Results, Row, attempts
from gpu_steps import ask, opened, text_of
from vlmforge import GenerationConfig, Pipeline

_STEPS = 24
_ATTENTION = "vf_decode"


@dataclass(frozen=True, slots=True)
class Ran:
    """A kernel or a copy: its name, and microseconds at which it began and ended."""

    name: str
    begin: float
    end: float


def traced(pipe: Pipeline, batch: int, context: int) -> list[Ran]:
    """What the GPU ran while so many rows decoded, in order."""
    from torch.profiler import ProfilerActivity, profile

    steps = _STEPS + 3 * batch
    prompts = [text_of(pipe, context - steps + 24, index) for index in range(batch)]
    generation = GenerationConfig(max_new_tokens=steps, ignore_eos=True)
    ask(pipe, prompts, generation)  # captures
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        ask(pipe, prompts, generation)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text("utf-8"))["traceEvents"]
    return sorted(_ran(events), key=lambda one: one.begin)


def _ran(events: Iterable[dict[str, Any]]) -> Iterable[Ran]:
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            yield Ran(_short(event["name"]), event["ts"], event["ts"] + event["dur"])


def _short(name: str) -> str:
    """A kernel's name without its types' arguments."""
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"\(anonymous namespace\)::|onnxruntime::(contrib::)?cuda::", "", name)
    return re.split(r"[<(]", name, maxsplit=1)[0][:60] if not name.startswith("Mem") else name


def last_steps(ran: Sequence[Ran], layers: int, steps: int = _STEPS // 2) -> list[Sequence[Ran]]:
    """The last whole steps: each begins behind the last layer's attention of the one before."""
    marks = [index for index, one in enumerate(ran) if one.name.startswith(_ATTENTION)]
    assert len(marks) > layers, f"attention ran {len(marks)} times; {sorted({r.name for r in ran})}"
    ends = marks[::-layers][: steps + 1][::-1]
    return [ran[begin + 1 : end + 1] for begin, end in itertools.pairwise(ends)]


def table(steps: Sequence[Sequence[Ran]]) -> list[Row]:
    """By kernel, the longest first: times and microseconds in a step; gaps at last."""
    times: dict[str, list[float]] = defaultdict(list)
    gaps = whole = 0.0
    for step in steps:
        end = step[0].begin
        for one in step:
            times[one.name].append(one.end - one.begin)
            gaps += max(0.0, one.begin - end)
            end = max(end, one.end)
        whole += end - step[0].begin
    rows = [
        {
            "kernel": name,
            "times": len(found) / len(steps),
            "each_us": sum(found) / len(found),
            "us": sum(found) / len(steps),
            "share": sum(found) / whole,
        }
        for name, found in times.items()
    ]
    rows.sort(key=lambda row: -row["us"])
    count = sum(map(len, steps)) / len(steps)
    rows.append({"kernel": "(gaps)", "times": count, "each_us": gaps / count / len(steps)})
    rows[-1] |= {"us": gaps / len(steps), "share": gaps / whole}
    return rows


def kernels(engine: Path, wanted: Sequence[str], results: Results) -> None:
    """The table of each BATCH:CONTEXT."""
    sizes = [(int(batch), int(context)) for batch, context in (w.split(":") for w in wanted)]
    with opened(engine, max(batch for batch, _ in sizes), results) as pipe:
        for batch, context in sizes:
            steps = last_steps(traced(pipe, batch, context), pipe.manifest.kv.layers)
            for row in table(steps):
                results.add("kernels", engine=engine.name, batch=batch, **row)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--batch", nargs="+", default=["1:1024"], metavar="BATCH:CONTEXT")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results = Results(given.out)
    work = lambda: kernels(given.engine, given.batch, results)  # noqa: E731
    attempts([(f"kernels of {given.engine.name}", work)])


if __name__ == "__main__":
    main()
