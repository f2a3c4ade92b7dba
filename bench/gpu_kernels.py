"""Where the time of a step goes, kernel by kernel: what the GPU itself says of a step of decoding.

    python3 bench/gpu_kernels.py ENGINE --batch 1:1024 64:1024 --prompts 1:640 3:640

`--batch`: steps of decoding; `--prompts`: steps of so many prompts of so many tokens. By torch's
profiler (CUPTI), in the process of the pipeline; of an engine of several ranks it is the first
rank's GPU. Shown are means over whole steps: how often a kernel runs in one, its time, and the gaps
in which nothing runs. Tracing itself costs a little: compare shares, not sums.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_results import Results, Row, attempts
from gpu_steps import ask, opened, text_of
from vlmforge import GenerationConfig, Pipeline

_STEPS = 24


@dataclass(frozen=True, slots=True)
class Ran:
    """A kernel or a copy: its name, and microseconds at which it began and ended."""

    name: str
    begin: float
    end: float


def traced(pipe: Pipeline, prompts: list[str], tokens: int) -> list[Ran]:
    """What the GPU ran while these were answered in so many tokens, in order."""
    from torch.profiler import ProfilerActivity, profile

    generation = GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
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


def last_steps(ran: Sequence[Ran], attention: str, layers: int) -> list[Sequence[Ran]]:
    """The last whole steps: each begins behind the last layer's attention of the one before."""
    marks = [index for index, one in enumerate(ran) if one.name.startswith(attention)]
    assert len(marks) > layers, f"{attention}: {len(marks)} of {sorted({r.name for r in ran})}"
    ends = marks[::-layers][: _STEPS // 2 + 1][::-1]
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
    rows: list[Row] = [
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


def decoding(pipe: Pipeline, batch: int, context: int) -> list[Sequence[Ran]]:
    """Steps of so many rows of so many tokens."""
    steps = _STEPS + 3 * batch
    prompts = [text_of(pipe, context - steps + 24, index) for index in range(batch)]
    return last_steps(traced(pipe, prompts, steps), "vf_decode", pipe.manifest.kv.layers)


def prefilling(pipe: Pipeline, batch: int, tokens: int) -> list[Sequence[Ran]]:
    """Steps of so many prompts of so many tokens."""
    prompts = [text_of(pipe, tokens, index) for index in range(6 * batch)]
    return last_steps(traced(pipe, prompts, 1), "vf_prefill", pipe.manifest.kv.layers)


def kernels(engine: Path, kinds: Mapping[str, Sequence[str]], results: Results) -> None:
    """The table of each BATCH:TOKENS."""
    sizes = {kind: [_size(words) for words in given] for kind, given in kinds.items()}
    slots = max(batch for found in sizes.values() for batch, _ in found)
    with opened(engine, slots, results) as pipe:
        for kind, work in (("decode", decoding), ("prompts", prefilling)):
            for batch, tokens in sizes[kind]:
                for row in table(work(pipe, batch, tokens)):
                    results.add(kind, engine=engine.name, batch=batch, tokens=tokens, **row)


def _size(words: str) -> tuple[int, int]:
    batch, tokens = map(int, words.split(":"))
    return batch, tokens


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--batch", nargs="*", default=[], metavar="BATCH:CONTEXT")
    parser.add_argument("--prompts", nargs="*", default=[], metavar="BATCH:TOKENS")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results, kinds = Results(given.out), {"decode": given.batch, "prompts": given.prompts}
    name = f"kernels of {given.engine.name}"
    attempts([(name, lambda: kernels(given.engine, kinds, results))])


if __name__ == "__main__":
    main()
