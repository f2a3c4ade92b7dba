"""Speed and memory against Hugging Face `generate()`: same weights, same run, interleaved.

    python bench/compare.py --sizes 60m 1b --work out/bench

Every round asks both sides about a new image, one after the other, in alternating order; figures
are medians over the rounds. Peak memory is the whole process's, loading included.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from child import Child
from new_image import saved_image
from vlmforge.engine.manifest import load_manifest
from vlmforge_recipes.llava.synthetic import PRESETS, write_checkpoint

QUESTION = "What is shown in this picture?"
SIDES = ("ours", "transformers")
_SECONDS = ("load", "preprocess", "encode", "prefill", "first_token")


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians of one side: seconds, tokens/s and bytes."""

    load: float
    preprocess: float
    encode: float
    prefill: float
    first_token: float
    decode_rate: float
    peak_rss: int


def read_bandwidth(threads: int, size: int = 1 << 28) -> float:
    """Bytes per second that `threads` threads read from memory, best of five (AVX maximum)."""
    blocks = [np.ones(size // 4, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(np.max, blocks))
            best = max(best, threads * size / (time.perf_counter() - begin))
    return best


def measure(size: str, work: Path, rounds: int, tokens: int) -> dict[str, Figures]:
    """Both sides on one size; makes the checkpoint and the engine if they are not there."""
    checkpoint, engine = work / f"{size}.checkpoint", work / f"{size}.engine"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, PRESETS[size])
    build = Path(sys.executable).with_name("build-engine")
    subprocess.run([build, checkpoint, "-o", engine], check=True)
    workers = {
        "ours": Child("worker.py", "ours", engine),
        "transformers": Child("worker.py", "transformers", checkpoint, quiet=True),
    }
    firsts: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    longs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for index in range(rounds + 1):
        order = SIDES if index % 2 else SIDES[::-1]
        for count, kept in ((1, firsts), (tokens, longs)):
            image = saved_image(work, index * 1000 + count)
            question = {"image": str(image), "question": QUESTION, "tokens": count}
            for side in order:
                answer = workers[side].ask(question)
                if index:  # the first round warms up
                    kept[side].append(answer)
    for worker in workers.values():
        worker.close()
    return {
        side: _figures(workers[side].hello["load"], firsts[side], longs[side]) for side in SIDES
    }


def _figures(
    load: float, firsts: Sequence[dict[str, float]], longs: Sequence[dict[str, float]]
) -> Figures:
    def median(rows: Sequence[dict[str, float]], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    first_token = median(firsts, "total")
    # What the tokens after the first took.
    rest = median(longs, "total") - first_token
    return Figures(
        load=load,
        preprocess=median(firsts, "preprocess"),
        encode=median(firsts, "encode"),
        prefill=median(firsts, "prefill"),
        first_token=first_token,
        decode_rate=(longs[0]["tokens"] - 1) / rest,
        peak_rss=int(max(row["peak_rss"] for row in longs)),
    )


def report(size: str, figures: dict[str, Figures], engine: Path, bandwidth: float) -> str:
    """The table of one size."""
    ours, theirs = (figures[side] for side in SIDES)
    manifest = load_manifest(engine)
    weights = sum(part.weight_bytes for part in manifest.parts)
    decoder = manifest.part("decoder").weight_bytes
    # A decoding step reads every decoder weight once, but only one row of the embedding.
    read = decoder - manifest.decode.vocab_size * manifest.decode.hidden_size * 4
    share = ours.decode_rate * read / bandwidth
    rows = [
        f"## {size}: weights {weights / 1e9:.2f} GB float32, "
        f"{manifest.decode.tokens_per_image} image tokens",
        "",
        "| median | vlmforge | transformers | better by |",
        "|---|---|---|---|",
        *(_row(f"{name} (s)", getattr(ours, name), getattr(theirs, name)) for name in _SECONDS),
        _row("decode (tokens/s)", ours.decode_rate, theirs.decode_rate, more_is_better=True),
        _row("peak RSS (GB)", ours.peak_rss / 1e9, theirs.peak_rss / 1e9),
        "",
        f"Decoding reads {read / 1e9:.2f} GB a token: {share:.0%} of the {bandwidth / 1e9:.1f} "
        "GB/s that a plain read of memory reaches here.",
        f"Peak RSS is {ours.peak_rss / weights:.2f}x the weights "
        f"(limit 1.15x + 0.6 GB = {(1.15 * weights + 0.6e9) / 1e9:.2f} GB).",
        "",
    ]
    return "\n".join(rows)


def _row(name: str, ours: float, theirs: float, *, more_is_better: bool = False) -> str:
    ratio = ours / theirs if more_is_better else theirs / ours
    return f"| {name} | {ours:.3f} | {theirs:.3f} | {ratio:.2f}x |"


def main() -> None:
    """Measure each size and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--sizes", nargs="+", default=["60m", "1b"], choices=tuple(PRESETS))
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--tokens", type=int, default=33)
    values = arguments.parse_args()
    values.work.mkdir(parents=True, exist_ok=True)
    for size in values.sizes:
        from vlmforge.limits import physical_cores

        threads = physical_cores()
        bandwidth = read_bandwidth(threads)
        figures = measure(size, values.work, values.rounds, values.tokens)
        print(f"\n{report(size, figures, values.work / f'{size}.engine', bandwidth)}", flush=True)


if __name__ == "__main__":
    main()
