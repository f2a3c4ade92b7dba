"""Everything about the attention kernels that needs a GPU, in one command of under 10 minutes.

    python3 bench/gpu_suite.py [test] [grid] [bench] [tune] [engines] [speed] [--out out/gpu]

Needs python3, numpy, torch, cuda-bindings, and nvcc or NVRTC; not vlmforge's environment, and no
TensorRT. `test`: the cases of tests/plugins_cuda on the GPU, CUDA graphs, compute-sanitizer.
`grid`: all cases that there are (minutes). `bench`: the kernels against the machine's own ceilings
and torch's SDPA, into a JSON file; from it gpu_report.py makes plugins_cuda/BENCH.md.
`engines` and `speed`: whole engines, each in a process of its own (`goldens` of gpu_engines.py, and
`accuracy` of the demo model's; gpu_figures.py); these need what serving needs, and engines that
were built elsewhere (`gpu_engines.py build`, `hollow.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "plugins_cuda"), str(ROOT / "tests"), str(ROOT / "bench")]

from attention_backends import CudaBackend, cuda_backend  # noqa: E402
from attention_cases import Case, covering, grid  # noqa: E402
from gpu_checks import (  # noqa: E402
    GRAPH_CASES,
    check_cases,
    check_chain,
    check_graph,
    check_narrow,
)
from vlmforge_plugins.cached_attention.compile import (  # noqa: E402
    Compiler,
    Nvcc,
    Nvrtc,
    compile_one,
)
from vlmforge_plugins.cached_attention.config import (  # noqa: E402
    Sizes,
    Target,
    configs,
    sizes,
    targets,
)
from vlmforge_plugins.errors import CompileError  # noqa: E402


@dataclass(frozen=True)
class Binaries:
    """Compiles what the GPU at hand needs, once."""

    by: Compiler
    cache: Path

    def find(self, chosen: Sizes, target: Target) -> bytes:
        """A cubin, from the cache if it is one that is shipped."""
        if chosen == sizes(chosen.config, target):
            return compile_one(chosen.config, target, self.by, self.cache).code
        return self.by.compile(chosen, target).code

    def find_all(self, target: Target) -> None:
        """Fills the cache with all that is shipped for `target`."""
        wanted = [c for c in configs() if target in targets(c)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda c: self.find(sizes(c, target), target), wanted))


def best_compiler() -> Compiler:
    """nvcc if there is one, for it runs in parallel; else NVRTC."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    try:
        return Nvcc(usual if usual.is_file() else None)
    except CompileError:
        return Nvrtc()


SANITIZED = (
    Case("decode", "float16", "float16", 128, 4, 989, 64),
    Case("decode", "bfloat16", "float8_e4m3fn", 104, 20, 65, 16),
    Case("chunk", "float16", "float16", 128, 4, 989, 32),
    Case("prefill", "bfloat16", "float8_e4m3fn", 104, 7, 65, 16),
    Case("prefill", "bfloat16", "bfloat16", 64, 1, 989, 128),
)


def sanitize(out: Path) -> list[str]:
    """compute-sanitizer over a few cases, its tools side by side; nothing if it is not there."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        print("  compute-sanitizer: not here")
        return []
    command = [sys.executable, __file__, "sanitized", "--out", str(out)]
    tools = {
        tool: subprocess.Popen(
            [program, "--tool", tool, "--error-exitcode", "9", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tool in ("memcheck", "racecheck", "synccheck")
    }
    failures = []
    for tool, process in tools.items():
        try:
            said, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"  {tool}: stopped after 120 s")
            continue
        lines = said.strip().splitlines()
        print(f"  {tool}: exit {process.returncode}; {lines[-1] if lines else ''}")
        if process.returncode != 0:
            failures.append(f"compute-sanitizer {tool}:\n" + "\n".join(lines[-30:]))
    return failures


def test(backend: CudaBackend, out: Path, strength: int) -> list[str]:
    """Correctness: all of it. Returns what failed."""
    failures = check_cases(backend, covering(strength))
    failures += check_narrow(backend, covering(2))
    for case in GRAPH_CASES:
        failures += check_graph(backend, case)
    print(f"  graphs: {len(GRAPH_CASES)} captured and replayed")
    chained = [c for c in configs() if c.stored == "float8_e4m3fn" or c.activation == "float16"]
    for config in chained:
        failures += check_chain(backend, config)
    print(f"  chains: of {len(chained)} configurations, overlapping and apart")
    return failures + sanitize(out)


def test_grid(parts: int = 16) -> list[str]:
    """All cases that there are, in processes side by side: making and judging them is Python's."""
    command = [sys.executable, __file__, "part", "--part"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, f"{i}/{parts}"], stdout=subprocess.PIPE, text=True, env=alone)
        for i in range(parts)
    ]
    failures = []
    for i, process in enumerate(processes):
        said, _ = process.communicate()
        print(f"  part {i}:{said}", end="", flush=True)
        if process.returncode != 0:
            failures.append(f"grid: part {i} failed")
    return failures


def bench(backend: CudaBackend, binaries: Binaries, out: Path, seconds: float) -> None:
    """Times every point until the time is up, most important first; writes results.json."""
    import torch

    import gpu_attention as timed

    deadline = time.monotonic() + seconds
    stage = timed.Stage()
    properties = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "gpu": properties.name,
        "driver": _driver_version(),
        "torch": torch.__version__,
        "compiler": binaries.by.version[:200],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "ceilings": timed.ceilings(),
        "decode": [],
        "prefill": [],
    }
    copy, matmul = (result["ceilings"][k] for k in ("copy_bytes_per_second", "matmul_float16"))
    print(f"  copy {copy / 1e12:.2f} TB/s, matmul {matmul / 1e12:.0f} TFLOP/s")
    points = [("prefill", p) for p in timed.prefill_points()]
    points += [("decode", p) for p in timed.decode_points()]
    for kind, point in points:
        if time.monotonic() > deadline:
            print("  time is up; the rest is left out")
            break
        chosen = sizes(point.config, backend.target)
        kernels = backend.kernels(point.config)
        row = timed.measure(point, stage, kernels, chosen, backend.machine)
        result[kind].append(row)
        (out / "results.json").write_text(json.dumps(result, indent=1), "utf-8")
        print("  " + line(kind, row, copy, matmul), flush=True)


def line(kind: str, row: dict[str, Any], copy: float, matmul: float) -> str:
    """One point in a line: its share of the ceiling, and the times of all."""
    ours = row["seconds"]["ours"]
    share = row["bytes"] / ours / copy if kind == "decode" else row["operations"] / ours / matmul
    times = " ".join(f"{name} {t * 1e6:9.1f}" for name, t in row["seconds"].items())
    what = f"b{row['batch']} past {row['past']} new {row['new']} kv {row['kv_heads']}"
    form = f"d{row['head_size']} {row['activation'][:2]}/{row['stored'][:6]} p{row['page_size']}"
    return f"{kind:7} {what:34} {form:20} {share:6.1%}  us: {times}"


def engines(folder: Path) -> list[str]:
    """Whole engines against their goldens, and the demo model's accuracy; what failed."""
    if not folder.is_dir():
        return [f"engines: no folder {folder}; python bench/gpu_engines.py build {folder}"]
    demo = sorted(map(str, folder.glob("demo.*")))
    failures = _engines("goldens", str(folder))
    return failures + (_engines("accuracy", *demo) if demo else [])


def speed(folder: Path, out: Path) -> list[str]:
    """All figures of large engines, as far as they are there (`gpu_figures.py`); what failed."""
    if not (folder / "7b.float16").is_dir():
        return [f"speed: no engine {folder / '7b.float16'}; python bench/hollow.py build ..."]
    command = [sys.executable, str(ROOT / "bench" / "gpu_figures.py"), "there"]
    command += ["--engines", str(folder), "--out", str(out / "figures.jsonl")]
    done = subprocess.run(command, check=False)
    return [] if done.returncode == 0 else [f"{' '.join(command)} ended with {done.returncode}"]


def _engines(*arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu_engines.py"), *arguments]
    done = subprocess.run(command, check=False)
    return [] if done.returncode == 0 else [f"{' '.join(command)} ended with {done.returncode}"]


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="*", default=["test", "bench"])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--strength", type=int, default=3, help="of the covering array of cases")
    parser.add_argument("--seconds", type=float, default=240, help="for the benchmark")
    parser.add_argument("--part", default="0/1", help="of the grid, for the step `part`")
    parser.add_argument("--engines", type=Path, default=ROOT / "out" / "gpu_engines")
    parser.add_argument("--plain", action="store_true", help="without Hopper's own instructions")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    binaries = Binaries(best_compiler(), ROOT / "out" / "gpu_kernels")
    backend = cuda_backend(binaries.find, options.plain)
    if backend is None:
        sys.exit("There is no GPU here. On one: python3 bench/gpu_suite.py")
    if options.steps == ["sanitized"]:
        failures = check_cases(backend, SANITIZED) + check_narrow(backend, SANITIZED)
        print("\n".join(failures))
        sys.exit(1 if failures else 0)
    if options.steps == ["part"]:
        first, parts = map(int, options.part.split("/"))
        failures = check_cases(backend, list(grid())[first::parts])
        print("\n".join(failures[:20]))
        sys.exit(1 if failures else 0)
    started = time.monotonic()
    binaries.find_all(backend.target)
    print(f"compiled in {time.monotonic() - started:.0f} s")
    failures = []
    if "test" in options.steps:
        failures = test(backend, options.out, options.strength)
        print(
            "\n".join(failures[:20]), f"\ntested in {time.monotonic() - started:.0f} s", flush=True
        )
    if "grid" in options.steps:
        failures += test_grid()
        print(f"whole grid: {time.monotonic() - started:.0f} s")
    if "engines" in options.steps:
        failures += engines(options.engines)
    if "speed" in options.steps:
        failures += speed(options.engines, options.out)
    if "tune" in options.steps:
        from gpu_tune import tune

        tune(backend.machine, binaries.by, backend.target, options.out)
    if "bench" in options.steps:
        bench(backend, binaries, options.out, options.seconds)
    print(f"done in {time.monotonic() - started:.0f} s, {len(failures)} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
