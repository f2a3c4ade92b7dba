"""The gated activation's kernels on one GPU: are they right, and how near to the copy rate?

    python3 bench/gpu_gates.py

Each call works on buffers of its own, in turns, so that what is large comes from memory; what is
small is in the cache, as it is between two products. At last a kernel stands between two products,
as in a step of decoding: overlapping with the one in front, apart, and torch's two ops.
Needs torch and cuda-bindings with NVRTC.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import gelu, silu

from gpu_results import Results, attempts
from gpu_timing import Work, copy_bandwidths, medians
from vlmforge_plugins.cached_attention.compile import Nvrtc, compile_source
from vlmforge_plugins.cached_attention.config import TARGETS
from vlmforge_plugins.cached_attention.driver import capability
from vlmforge_plugins.cached_attention.kernel_store import newest_target
from vlmforge_plugins.gated_activation.compile import source_of
from vlmforge_plugins.gated_activation.driver import CudaKernels
from vlmforge_plugins.gated_activation.launcher import NAMES, Gate, launch_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
ROWS, WIDTHS = (1, 64, 2048, 8192), (11008, 5504)
HIDDEN, LAYERS = 4096, 16
ROUND = 512 << 20  # bytes that a round goes through, where 64 calls go through as much


@dataclass(frozen=True)
class Ours:
    """The kernel of one activation and dtype."""

    activation: str
    dtype: str
    kernels: CudaKernels

    @classmethod
    def made(cls, activation: str, dtype: str, cache: Path) -> Ours:
        """Compiled for this GPU."""
        target = newest_target(TARGETS, capability())
        assert target is not None, capability()
        binary = compile_source(source_of(activation, dtype, target), target, Nvrtc(), cache)
        return cls(activation, dtype, CudaKernels(binary.code, target, NAMES[activation, dtype]))

    def work(self, given: Any, out: Any, overlap: bool | None = None) -> Work:
        """Of rows `[r, 2 n]`; `overlap` is as the kernel was compiled where it is None."""
        rows, width = out.shape
        gate = Gate(given.data_ptr(), out.data_ptr(), rows, width, self.activation, self.dtype)
        overlap = self.kernels.overlap if overlap is None else overlap
        launch, params = launch_of(gate, overlap=overlap)

        def run() -> None:
            self.kernels.launch(launch, params, torch.cuda.current_stream().cuda_stream)

        return run


def reference(activation: str, given: Any) -> Any:
    """In float64."""
    gate, up = given.double().chunk(2, dim=-1)
    if activation == "silu":
        return silu(gate) * up
    return gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def check(activation: str, dtype: str, cache: Path) -> None:
    """All sizes, eagerly and replayed, within one rounding; extremes as torch has them."""
    ours, limit = Ours.made(activation, dtype, cache), 2.0**-11 if dtype == "float16" else 2.0**-8
    worst = 0.0
    for rows, width in ((1, 8), (3, 7), (5, 1000), (64, 5504), (2, 11008), (17, 2049), (300, 24)):
        given = (3 * torch.randn(rows, 2 * width, device="cuda")).to(DTYPES[dtype])
        out = torch.full((rows, width), torch.nan, dtype=given.dtype, device="cuda")
        work = ours.work(given, out)
        work()
        eager, wanted = out.clone(), reference(activation, given)
        error = (eager.double() - wanted).abs() - 1.05 * limit * wanted.abs() - 2.0**-24
        worst = max(worst, float(error.max()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, eager), f"the replay of {rows} x {width} differs"
    assert worst <= 0, f"{activation} {dtype}: {worst:.1e} beyond a rounding"
    odd = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 200.0, -200.0, 6e4]
    given = torch.tensor([odd + [1.0] * 8], device="cuda").to(DTYPES[dtype])
    out = torch.empty(1, 8, dtype=given.dtype, device="cuda")
    ours.work(given, out)()
    wanted = reference(activation, given).to(given.dtype)
    assert torch.equal(out.isnan(), wanted.isnan()), (out, wanted)
    assert torch.allclose(out.nan_to_num(), wanted.nan_to_num(), rtol=2 * limit), (out, wanted)
    print(f"  {activation} {dtype}: right", flush=True)


def speed(dtype: str, cache: Path, results: Results) -> None:
    """Ours and torch's, by rows and width: microseconds and the share of the copy rate."""
    copy, ours = max(copy_bandwidths().values()), Ours.made("silu", dtype, cache)
    print(f"  copy rate {copy / 1e12:.2f} TB/s", flush=True)
    for width in WIDTHS:
        for rows in ROWS:
            size = 3 * 2 * rows * width
            count = min(64, max(4, ROUND // size))
            pairs = [_buffers(rows, width, dtype) for _ in range(count)]
            mine = [ours.work(given, out) for given, out in pairs]
            theirs = [partial(_torch, given, out) for given, out in pairs]
            times = medians({"ours": mine, "torch": theirs})
            row = {"case": f"{dtype} {rows} x {width}", "us": 1e6 * times["ours"]}
            shares = {f"{way}_share": size / times[way] / copy for way in times}
            results.add("gates", **row, torch_us=1e6 * times["torch"], **shares)
            del pairs, mine, theirs


def _buffers(rows: int, width: int, dtype: str) -> tuple[Any, Any]:
    given = torch.randn(rows, 2 * width, device="cuda", dtype=DTYPES[dtype])
    return given, torch.empty(rows, width, device="cuda", dtype=DTYPES[dtype])


def _torch(given: Any, out: Any) -> None:
    gate, up = given.chunk(2, dim=-1)
    torch.mul(silu(gate), up, out=out)


def between(width: int, rows: int, dtype: str, cache: Path, results: Results) -> None:
    """Behind a product and before one, of layers with weights of their own."""
    ours, kind = Ours.made("silu", dtype, cache), DTYPES[dtype]
    first = [torch.randn(HIDDEN, 2 * width, device="cuda", dtype=kind) for _ in range(LAYERS)]
    second = [torch.randn(width, HIDDEN, device="cuda", dtype=kind) for _ in range(LAYERS)]
    x, y = (torch.randn(rows, HIDDEN, device="cuda", dtype=kind) for _ in range(2))
    given, out = _buffers(rows, width, dtype)

    def layers(gates: Sequence[Work]) -> list[Work]:
        def layer(index: int) -> None:
            torch.mm(x, first[index], out=given)
            for gate in gates:
                gate()
            torch.mm(out, second[index], out=y)

        return [partial(layer, index) for index in range(LAYERS)]

    ways = {
        "nothing": layers([]),
        "overlapping": layers([ours.work(given, out)]),
        "apart": layers([ours.work(given, out, overlap=False)]),
        "torch": layers([partial(_torch, given, out)]),
    }
    times = medians(ways)
    cost = {f"{way}_us": 1e6 * (times[way] - times["nothing"]) for way in ways if way != "nothing"}
    results.add("gates_between", case=f"{rows} x {width}", layer_us=1e6 * times["nothing"], **cost)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("out/kernels"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.zeros(1, device="cuda")
    results, cache = Results(given.out), given.cache
    works = [(f"{a} {d}", partial(check, a, d, cache)) for a, d in NAMES]
    works += [(f"speed {dtype}", partial(speed, dtype, cache, results)) for dtype in DTYPES]
    for rows, width in itertools.product((1, 64), WIDTHS):
        work = partial(between, width, rows, "float16", cache, results)
        works.append((f"between products, {rows} x {width}", work))
    attempts(works)


if __name__ == "__main__":
    main()
