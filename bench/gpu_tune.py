"""Times variants of the kernels and of their plans, to choose the constants of config.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_attention import Point, Stage, ceilings
from gpu_timing import Work, medians
from vlmforge_plugins.cached_attention.compile import Compiler, source_of
from vlmforge_plugins.cached_attention.config import Sizes, Target, sizes
from vlmforge_plugins.cached_attention.driver import CudaKernels
from vlmforge_plugins.cached_attention.plan import Launch, Machine, Plan, apart, workspace
from vlmforge_plugins.cached_attention.plan import _decode as decode_launches

DECODE = (
    Point(64, 4095, 1, 32),
    Point(64, 8191, 1, 8),
    Point(256, 8191, 1, 4),
    Point(16, 4095, 1, 8),
    Point(16, 4095, 1, 4),
    Point(16, 511, 1, 8),
    Point(4, 511, 1, 32),
    Point(1, 511, 1, 8),
    Point(4, 2047, 1, 8),
    Point(1, 4095, 1, 4),
    Point(1, 2047, 1, 8),
    Point(1, 8191, 1, 8),
    Point(16, 511, 1, 4),
    Point(16, 8191, 1, 4),
    Point(4, 4095, 1, 4),
    Point(16, 2047, 1, 8),
    Point(1, 32767, 1, 8),
    Point(64, 8191, 1, 8, stored="float8_e4m3fn"),
    Point(32, 8191, 1, 8, head_size=64),
)
PREFILL = (
    Point(4, 0, 8192, 8),
    Point(1, 0, 16384, 32),
    Point(1, 0, 2048, 8),
    Point(4, 14336, 512, 8),
    Point(4, 0, 8192, 4),
    Point(4, 0, 4096, 8, head_size=64),
    Point(4, 0, 4096, 8, head_size=80),
    Point(4, 0, 4096, 8, head_size=104),
)


@dataclass(frozen=True)
class Variant:
    """A way to compile, and a change of the plan."""

    sizes: Sizes
    change: Callable[[Plan], Plan] = lambda chosen: chosen
    ordered: bool = False


def with_splits(splits: int, chosen_sizes: Sizes) -> Callable[[Plan], Plan]:
    """A decode plan with this many splits."""

    def change(chosen: Plan) -> Plan:
        launches: tuple[Launch, ...] = decode_launches(chosen.shape, chosen_sizes, splits)
        scratch = workspace(chosen.shape, chosen.head_size, splits)
        return replace(
            chosen,
            splits=splits,
            launches=(chosen.launches[0], *launches),
            workspace=scratch,
        )

    return change


def decode_variants(point: Point, base: Sizes) -> dict[str, Variant]:
    """Depths of the ring, registers, cache hints, splits."""
    found = {
        "base": Variant(base),
        "unfused": Variant(replace(base, fused=False)),
        "ordered": Variant(base, ordered=True),
        "warps 8": Variant(replace(base, decode_warps=8)),
        "warps 8, stages 3": Variant(replace(base, decode_warps=8, decode_stages=3)),
        **{f"stages {n}": Variant(replace(base, decode_stages=n)) for n in (2, 3, 4)},
        **{f"stages {n}, apart": Variant(replace(base, decode_stages=n), apart) for n in (2, 3)},
        **{f"blocks {n}": Variant(replace(base, decode_blocks=n)) for n in (3, 4)},
    }
    splits = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    fit = [n for n in splits if n <= max(1, point.total // 64)]
    wide = replace(base, decode_warps=8)
    found |= {f"s{n}": Variant(base, with_splits(n, base)) for n in fit}
    return found | {f"w8 s{n}": Variant(wide, with_splits(n, wide)) for n in fit}


def prefill_variants(base: Sizes) -> dict[str, Variant]:
    """Heads together or one after the other, the path of other GPUs."""
    hopper = replace(base, hopper=True)
    return {
        "base": Variant(hopper),
        "one head": Variant(hopper, lambda p: replace(p, heads_together=1)),
        "all heads": Variant(hopper, lambda p: replace(p, heads_together=p.shape.heads)),
        **{f"buffers {n}": Variant(replace(hopper, buffers=n)) for n in (4, 5, 6, 7, 8, 12)},
        "mma": Variant(replace(base, hopper=False)),
    }


def tune(machine: Machine, by: Compiler, target: Target, out: Path) -> None:
    """Prints, for every point, the share of the ceiling of every variant."""
    table: list[tuple[Point, dict[str, Variant]]] = []
    for point in (*PREFILL, *DECODE):
        base = sizes(point.config, target)
        found = prefill_variants(base) if point.new > 1 else decode_variants(point, base)
        fit = machine.shared_bytes - 1024
        found = {
            n: v
            for n, v in found.items()
            if max(v.sizes.decode_bytes, v.sizes.prefill_bytes) <= fit
        }
        table.append((point, found))
    wanted = sorted({v.sizes for _, found in table for v in found.values()}, key=str)
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda s: by.compile(source_of(s), target).code, wanted))
    kernels = {s: CudaKernels(code, s) for s, code in zip(wanted, codes, strict=True)}
    stage, limits = Stage(), ceilings()
    print("  " + json.dumps(limits), flush=True)
    rows: list[dict[str, Any]] = []
    for point, found in table:
        works: dict[str, list[Work]] = {
            name: stage.ours(point, kernels[v.sizes], v.sizes, machine, v.change, v.ordered)
            for name, v in found.items()
        }
        seconds = medians(works, 0.3)
        work, ceiling = (
            (point.bytes_moved, limits["copy_bytes_per_second"])
            if point.new == 1
            else (point.operations, limits["matmul_float16"])
        )
        shares = {name: round(work / s / ceiling, 3) for name, s in seconds.items()}
        rows.append({"point": str(point), "shares": shares, "seconds": seconds})
        (out / "tune.json").write_text(json.dumps(rows, indent=1), "utf-8")
        form = f"{point.batch}x{point.past}+{point.new} kv{point.kv_heads} d{point.head_size}"
        print(f"  {form} {point.stored[:6]}: {json.dumps(shares)}", flush=True)
