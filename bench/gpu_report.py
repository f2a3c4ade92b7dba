"""Makes plugins_cuda/BENCH.md and its roofline plot from what gpu_suite.py measured.

    python3 bench/gpu_report.py plugins_cuda/bench_results.json

Needs matplotlib; no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "plugins_cuda"
Row = dict[str, Any]


def ceiling(result: Row, row: Row) -> float:
    """Of a decode step, bytes in a second; of a prefill, operations in a second."""
    limits = result["ceilings"]
    if row["new"] == 1:
        return float(limits["copy_bytes_per_second"])
    return float(limits[f"matmul_{row['activation']}"])


def share(result: Row, row: Row) -> float:
    """Of the ceiling that bounds it."""
    amount = row["bytes"] if row["new"] == 1 else row["operations"]
    return float(amount / row["seconds"]["ours"] / ceiling(result, row))


def rival(row: Row) -> tuple[str, float]:
    """The fastest of torch's own, and its seconds; NaN where none computes the same."""
    others = {n: row["seconds"].get(n, math.nan) for n in ("flash", "cudnn")}
    others = {n: s for n, s in others.items() if not math.isnan(s)}
    return min(others.items(), key=lambda pair: pair[1]) if others else ("none", math.nan)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Lines of Markdown."""
    names = list(header)
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def cells(result: Row, row: Row) -> list[str]:
    """A row of the tables."""
    name, seconds = rival(row)
    ours = row["seconds"]["ours"]
    rate = row["bytes"] / ours / 1e12 if row["new"] == 1 else row["operations"] / ours / 1e12
    group = row["heads"] // row["kv_heads"]
    types = row["activation"] if row["stored"] == row["activation"] else f"{row['stored']} cache"
    against = "" if math.isnan(seconds) else f"{seconds * 1e6:.1f} ({name}), {seconds / ours:.2f}x"
    return [
        str(row["batch"]),
        str(row["past"] + row["new"] if row["new"] == 1 else row["past"]),
        *([] if row["new"] == 1 else [str(row["new"])]),
        "MHA" if group == 1 else f"GQA {group}",
        f"{row['head_size']}, {types}, {row['page_size']}",
        f"{ours * 1e6:.1f}",
        f"{rate:.2f}" if row["new"] == 1 else f"{rate:.0f}",
        f"{share(result, row):.0%}",
        against,
        *(f"{row['seconds'][name] * 1e6:.1f}" for name in ("apart", "with write")),
    ]


def verdicts(result: Row) -> Iterator[str]:
    """What the numbers say, worked out from them."""
    busy = [r for r in result["decode"] if r["batch"] >= 16 and r["past"] >= 4095]
    if busy:
        low, high = (f(share(result, r) for r in busy) for f in (min, max))
        yield f"- Decode, batch >= 16, context >= 4096: {low:.0%} to {high:.0%} of the copy rate."
        if high > 1.05:
            yield (
                "  More than all of it, so this copy was not the fastest way to move bytes; "
                "the TB/s column is what counts."
            )
    for kind in ("decode", "prefill"):
        rows = [r for r in result[kind] if not math.isnan(rival(r)[1])]
        for name in ("flash", "cudnn"):
            ratios = [
                r["seconds"][name] / r["seconds"]["ours"]
                for r in rows
                if not math.isnan(r["seconds"].get(name, math.nan))
            ]
            if ratios:
                slower = sum(ratio < 0.98 for ratio in ratios)
                yield (
                    f"- {kind.capitalize()} against torch's {name}: {min(ratios):.2f}x to "
                    f"{max(ratios):.2f}x its speed; behind it by over 2 % at {slower} of "
                    f"{len(ratios)} points."
                )
    for name, words in (("apart", "launched apart"), ("with write", "with the write")):
        for kind in ("decode", "prefill"):
            rows, missed = compared(result[kind], name)
            if rows:
                yield (
                    f"- {kind.capitalize()} {words} against torch's best, which writes nothing: "
                    f"behind it by over 2 % at {len(missed)} of {len(rows)} points."
                )
    ratios = [
        row["seconds"]["cudnn with write"] / row["seconds"]["with write"]
        for row in result["decode"]
        if not math.isnan(row["seconds"].get("cudnn with write", math.nan))
    ]
    if ratios:
        yield (
            "- Decode with rotation and write against torch's cudnn behind a copy of the new keys "
            f"and values, unrotated: {min(ratios):.2f}x to {max(ratios):.2f}x its speed; behind it "
            f"by over 2 % at {sum(r < 0.98 for r in ratios)} of {len(ratios)} points."
        )
    long = [r for r in result["prefill"] if r["past"] + r["new"] >= 8192 and r["head_size"] == 128]
    if long:
        low, high = (f(share(result, r) for r in long) for f in (min, max))
        yield f"- Prefill, 8192 tokens and more, D 128: {low:.0%} to {high:.0%} of the matmul rate."


def targets(result: Row) -> Iterator[str]:
    """What was aimed at, and whether it was reached."""
    busy = [r for r in result["decode"] if r["batch"] >= 16 and r["past"] >= 4095]
    long = [r for r in result["prefill"] if r["past"] + r["new"] >= 8192 and r["head_size"] == 128]
    for what, rows, missed in (
        (
            "decode at 85 % of the copy rate, batch >= 16, context >= 4096",
            busy,
            [r for r in busy if share(result, r) < 0.85],
        ),
        (
            "prefill at 60 % of the matmul rate, 8192 tokens and more, D 128",
            long,
            [r for r in long if share(result, r) < 0.6],
        ),
        *(
            (
                f"{kind} not slower than the best of torch's SDPA (by over 2 %)",
                *compared(result[kind]),
            )
            for kind in ("decode", "prefill")
        ),
    ):
        verdict = "**met**" if not missed else "**missed**"
        reached = f"reached at {len(rows) - len(missed)} of {len(rows)} points"
        yield f"- Target {verdict}: {what}; {reached}."
        if 0 < len(missed) <= 6:
            yield "  Missed at " + "; ".join(place(result, row) for row in missed) + "."


def compared(rows: list[Row], name: str = "ours") -> tuple[list[Row], list[Row]]:
    """The points that torch can do, and those where it is faster by over 2 %."""
    rivals = [row for row in rows if not math.isnan(rival(row)[1])]
    return rivals, [row for row in rivals if rival(row)[1] < 0.98 * row["seconds"][name]]


def place(result: Row, row: Row) -> str:
    """A point in words, with its share of the ceiling and its speed as a part of torch's."""
    group = row["heads"] // row["kv_heads"]
    form = "" if row["stored"] == row["activation"] else f", {row['stored']} cache"
    form += f", D {row['head_size']}, pages of {row['page_size']}"
    size = f"batch {row['batch']}, {row['past'] + row['new']} tokens, GQA {group}{form}"
    return f"{size}: {share(result, row):.1%}, {rival(row)[1] / row['seconds']['ours']:.2f}x"


def document(result: Row) -> str:
    """BENCH.md."""
    limits = result["ceilings"]
    copies = limits.get("copies", {"copied in a graph": limits["copy_bytes_per_second"]})
    ways = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in copies.items())
    head = ["batch", "context"], ["batch", "past", "new"]
    rest = ["heads", "D, type, page", "us", "", "share", "torch's best, us"]
    rest += ["apart, us", "with write, us"]
    lines = [
        "# Attention kernels on a GPU",
        "",
        "Made by `bench/gpu_report.py` from `bench_results.json`; do not edit. `make bench-gpu` "
        "makes both anew.",
        "",
        f"{result['gpu']}, driver {result['driver']}, torch {result['torch']}, "
        f"{result['date']}. Times are medians of CUDA-graph replays that walk through more memory "
        "than the caches hold, 12 to 24 calls a graph where they fit; contestants alternate. "
        "32 query heads; random pages. Only the "
        "attention is timed (decode with its combine), not the write of the new token. torch's "
        "SDPA reads dense caches, in float16 also where ours reads fp8.",
        "",
        "On Hopper and later our kernels start while the one in front of them ends (programmatic "
        "dependent launch); torch's do not. In an engine the one in front is the short write of "
        "the new tokens; here it is the call before, so that decode reads on through its end. The "
        "columns at the right tell what that is worth: *apart* is the same kernels launched one "
        "after the other, *with write* what an engine launches: rotary embedding and write of the "
        "new tokens, which waits for the call before, and attention.",
        "",
        f"Ceilings measured in the same run: a copy within device memory, bytes read plus written, "
        f"TB/s: {ways}; a matrix product 8192 x 8192 x 8192: "
        f"{limits['matmul_float16'] / 1e12:.0f} TFLOP/s in float16, "
        f"{limits['matmul_bfloat16'] / 1e12:.0f} in bfloat16."
        + (
            f" A sum reads {limits['read_bytes_per_second'] / 1e12:.2f} TB/s."
            if "read_bytes_per_second" in limits
            else ""
        ),
        "",
        *targets(result),
        "",
        *verdicts(result),
        "",
        "![roofline](roofline.png)",
        "",
        "## Decode: bytes of the cache, as a share of the copy rate",
        "",
        *table(
            [*head[0], *rest[:3], "TB/s", *rest[4:]], (cells(result, r) for r in result["decode"])
        ),
        "",
        "## Prefill: causal operations, as a share of the matmul rate",
        "",
        *table(
            [*head[1], *rest[:3], "TFLOP/s", *rest[4:]],
            (cells(result, r) for r in result["prefill"]),
        ),
        "",
    ]
    return "\n".join(lines)


def plot(result: Row, to: Path) -> None:
    """The roofline: operations a byte against operations a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    copy = result["ceilings"]["copy_bytes_per_second"]
    peak = result["ceilings"]["matmul_float16"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    intensities = [0.5, peak / copy, 20000]
    axes.plot(
        intensities,
        [min(i * copy, peak) / 1e12 for i in intensities],
        color="black",
        label=f"copy {copy / 1e12:.2f} TB/s, matmul {peak / 1e12:.0f} TFLOP/s",
    )
    marks = {"ours": ("o", "tab:red"), "flash": ("x", "tab:gray"), "cudnn": ("+", "tab:blue")}
    for name, (mark, colour) in marks.items():
        rows = [
            r for r in (*result["decode"], *result["prefill"]) if r["stored"] == r["activation"]
        ]
        rows = [r for r in rows if not math.isnan(r["seconds"].get(name, math.nan))]
        axes.scatter(
            [r["operations"] / r["bytes"] for r in rows],
            [r["operations"] / r["seconds"][name] / 1e12 for r in rows],
            marker=mark,
            color=colour,
            s=22,
            linewidths=1,
            label=name,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte of device memory",
        ylabel="TFLOP/s",
        title=f"Attention on {result['gpu']}, {result['date']}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(to, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    result = json.loads(options.results.read_text("utf-8"))
    (options.folder / "BENCH.md").write_text(document(result), "utf-8")
    (options.folder / "bench_results.json").write_text(json.dumps(result, indent=1), "utf-8")
    plot(result, options.folder / "roofline.png")


if __name__ == "__main__":
    main()
