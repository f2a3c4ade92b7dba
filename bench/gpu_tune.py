"""Times variants of the kernels' sizes on a few points, to choose the constants of config.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from gpu_attention import Point, Stage, ceilings
from gpu_timing import medians
from vlmforge_plugins.cached_attention.compile import Compiler
from vlmforge_plugins.cached_attention.config import Target, sizes
from vlmforge_plugins.cached_attention.driver import CudaKernels
from vlmforge_plugins.cached_attention.plan import Machine

DECODE = (
    Point(16, 4095, 1, 8),
    Point(16, 4095, 1, 4),
    Point(64, 8191, 1, 8),
    Point(16, 4095, 1, 32),
    Point(64, 4095, 1, 32),
    Point(1, 32767, 1, 8),
    Point(64, 8191, 1, 8, stored="float8_e4m3fn"),
)
PREFILL = (Point(4, 0, 8192, 8), Point(4, 0, 8192, 8, head_size=64))


def tune(machine: Machine, by: Compiler, target: Target, out: Path) -> None:
    """Prints, for every point, the share of the ceiling of every variant."""
    stage = Stage()
    limits = ceilings()
    rows = []
    for point in (*DECODE, *PREFILL):
        base = sizes(point.config, target)
        variants = (
            {f"stages {n}": replace(base, decode_stages=n) for n in (2, 3, 4)}
            if point.new == 1
            else {
                "hopper": replace(base, hopper=not point.config.fp8),
                **{f"tiles {n}": replace(base, prefill_tiles=n, hopper=False) for n in (1, 2)},
            }
        )
        works = {}
        for name, chosen in variants.items():
            if max(chosen.decode_bytes, chosen.prefill_bytes) <= machine.shared_bytes - 1024:
                kernels = CudaKernels(by.compile(chosen, target).code, chosen)
                works[name] = stage.ours(point, kernels, chosen, machine)
        seconds = medians(works)
        work, ceiling = (
            (point.bytes_moved, limits["copy_bytes_per_second"])
            if point.new == 1
            else (point.operations, limits["matmul_float16"])
        )
        shares = {name: round(work / s / ceiling, 3) for name, s in seconds.items()}
        rows.append({"point": str(point), "shares": shares, "seconds": seconds})
        print(
            f"  {point.batch}x{point.total} kv{point.kv_heads} d{point.head_size} "
            f"{point.stored}: {shares}",
            flush=True,
        )
    (out / "tune.json").write_text(json.dumps(rows, indent=1), "utf-8")
