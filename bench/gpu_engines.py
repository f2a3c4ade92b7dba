"""Whole engines on a GPU: do golden checkpoints answer as they should, and how fast is a step?

    python bench/gpu_engines.py build ENGINES           # where the builder is, without a GPU
    python3 bench/gpu_engines.py goldens ENGINES        # folders named CHECKPOINT.KIND
    python3 bench/gpu_engines.py accuracy ENGINE ...    # of the demo model
    python3 bench/gpu_engines.py sampling ENGINE ...    # every token chosen there, against the host
    python3 bench/gpu_engines.py speed ENGINE --batch 1:640 8:1024 --out results.jsonl
    python3 bench/gpu_engines.py report results.jsonl   # of gpu_figures.py, into RESULTS.md

Kinds are those of `KINDS`. `goldens` compares engines of 16 bits with the originals, and each with
the goldens of its own build. Needs what serving needs; for the originals pytest too. What steps,
requests and memory cost is measured by gpu_figures.py, of which `speed` is a part.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "runtime"), str(ROOT / "plugins_cuda")]
sys.path[:0] = [str(ROOT / folder) for folder in ("builder", "recipes", "scripts")]

from vlmforge import pipeline  # noqa: E402
from vlmforge.backends.cuda import machine  # noqa: E402

DEMO = "demo"
DEMO_CHECKPOINT = ROOT / "recipes" / "vlmforge_recipes" / "llava" / "demo" / "checkpoint"
KINDS = {
    "float16": ("--dtype", "float16"),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--dtype", "float16", "--weights", "int8"),
    "int4": ("--dtype", "float16", "--weights", "int4"),
    "fp8": ("--dtype", "float16", "--kv-dtype", "fp8"),
    "tp2": ("--dtype", "float16", "--tp", "2"),
    "tp2_bfloat16": ("--dtype", "bfloat16", "--tp", "2"),
    "tp2_int8": ("--dtype", "float16", "--tp", "2", "--weights", "int8"),
    "tp2_int4": ("--dtype", "float16", "--tp", "2", "--weights", "int4"),
    "tp2_fp8": ("--dtype", "float16", "--tp", "2", "--kv-dtype", "fp8"),
}
_QUESTIONS = 1300


def build(engines: Path, checkpoints: list[str], kinds: list[str]) -> None:
    """Engines of all kinds with their goldens; those that are there stay."""
    from conftest import DATA, build_once

    kept = ROOT / "out" / "gpu_build" / "cache"  # kernels, and graphs as they were traced
    for folder in (kept, engines):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["VLMFORGE_CACHE"] = str(kept)
    found = sorted(path.parent.name for path in DATA.glob("*/cases.json"))
    for name in checkpoints or [DEMO, *found]:
        folder = DEMO_CHECKPOINT if name == DEMO else DATA / name / "checkpoint"
        for kind in kinds or KINDS:
            options = ("--target", "cuda", "--max-batch-size", "4", *KINDS[kind])
            engine = build_once(engines / f"{name}.{kind}", folder, *options)
            size = sum(path.stat().st_size for path in engine.rglob("*") if path.is_file())
            print(f"{engine}: {size / 1e6:.1f} MB", flush=True)


def goldens(engines: Path) -> int:
    """Every case of every golden checkpoint; the number of engines that failed."""
    failed = 0
    for engine in sorted(path for path in engines.iterdir() if (path / "engine.json").exists()):
        began = time.perf_counter()
        try:
            words = f"{originals(engine)}{own_goldens(engine)}"
        except Exception:  # noqa: BLE001 - the others are to be seen too
            failed += 1
            words = "FAILED\n" + "\n".join(traceback.format_exc().splitlines()[-25:])
        print(f"{engine.name}: {words}{time.perf_counter() - began:.1f} s in all", flush=True)
    return failed


def originals(engine: Path) -> str:
    """What the original code gave, for engines whose weights are the original's."""
    name, kind = engine.name.rsplit(".", 1)
    if name == DEMO or kind not in ("float16", "bfloat16", "tp2", "tp2_bfloat16"):
        return ""
    from golden_models import TOLERANCES, Golden, cases_of, check_answer, check_images, check_prompt

    began = time.perf_counter()
    with pipeline(engine) as pipe:
        loaded = time.perf_counter()
        golden, limits = Golden(name, pipe), TOLERANCES[pipe.manifest.dtype]
        check_images(golden, limits)
        cases = [case["id"] for case in cases_of(name)]
        for case in cases:
            check_prompt(golden, case)
            check_answer(golden, case, limits)
    return f"{len(cases)} cases equal the originals'; loaded in {loaded - began:.1f} s; "


def own_goldens(engine: Path) -> str:
    """What the processor gave when it was built (AssertionError: it gives something else)."""
    from vlmforge.evaluation.verify import FOLDER, verify

    if not (engine / FOLDER).is_dir():
        return "no goldens of its build; "
    results = list(verify(engine))
    wrong = [f"{r.case} {r.stage}: {r.detail}" for r in results if not r.passed]
    if wrong:
        raise AssertionError("not the goldens of its build:\n" + "\n".join(wrong))
    logits = [result.detail for result in results if result.stage == "logits"]
    return f"{len(results)} stages of its build's goldens met ({'; '.join(logits)}); "


def accuracy(engines: list[Path]) -> None:
    """The demo model's share of right answers, by the kind of question, for each engine."""
    from precision import table
    from vlmforge.evaluation.cases import held_out_cases
    from vlmforge.evaluation.evaluate import evaluate

    cases, reports = list(held_out_cases(_QUESTIONS)), {}
    for engine in engines:
        with pipeline(engine) as pipe:
            reports[engine.name] = evaluate(pipe, cases, lambda done, total: None)
        print(f"{engine.name}: asked {len(cases)}", flush=True)
    print(machine.find_gpu().name)
    print(table(reports))


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    kinds = arguments.add_subparsers(dest="kind", required=True)
    kinds.add_parser("goldens").add_argument("engines", type=Path)
    made = kinds.add_parser("build")
    made.add_argument("engines", type=Path)
    made.add_argument("--checkpoints", nargs="+", default=[], metavar="NAME")
    made.add_argument("--kinds", nargs="+", default=[], choices=KINDS, metavar="KIND")
    kinds.add_parser("report").add_argument("results", type=Path)
    kinds.add_parser("accuracy").add_argument("engines", type=Path, nargs="+")
    kinds.add_parser("sampling").add_argument("engines", type=Path, nargs="+")
    timed = kinds.add_parser("speed")
    timed.add_argument("engine", type=Path)
    timed.add_argument("--batch", nargs="+", default=["1:640", "8:1024", "32:1024", "64:1024"])
    timed.add_argument("--out", type=Path)
    values = arguments.parse_args()
    if values.kind == "build":
        return build(values.engines, values.checkpoints, values.kinds)
    if values.kind == "goldens":
        sys.exit(goldens(values.engines))
    if values.kind == "report":
        from gpu_tables import write

        return write(values.results)
    if values.kind == "accuracy":
        return accuracy(values.engines)
    if values.kind == "speed":
        from gpu_steps import Results, card, decode

        card(Results(values.out))
        return decode(values.engine, values.batch, Results(values.out))
    from gpu_sampling import engine

    sys.exit(min(1, sum(map(engine, values.engines))))


if __name__ == "__main__":
    main()
