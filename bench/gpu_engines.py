"""Whole engines on a GPU: do golden checkpoints answer as they should, and how fast is a step?

    python bench/gpu_engines.py build ENGINES           # where the builder is, without a GPU
    python3 bench/gpu_engines.py goldens ENGINES        # folders named CHECKPOINT.KIND
    python3 bench/gpu_engines.py accuracy ENGINE ...    # of the demo model
    python3 bench/gpu_engines.py sampling ENGINE ...    # every token chosen there, against the host
    python3 bench/gpu_engines.py speed ENGINE --batch 1:640 8:1024 --out results.json
    python3 bench/gpu_engines.py report results.json    # into RESULTS.md

Kinds are those of `KINDS`. `goldens` compares engines of 16 bits with the originals, and each with
the goldens of its own build. Needs what serving needs; for the originals pytest too, and for the
yardstick of `speed` torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "runtime"), str(ROOT / "plugins_cuda")]
sys.path[:0] = [str(ROOT / folder) for folder in ("builder", "recipes", "scripts")]

from gpu_watched import Watched, figures  # noqa: E402
from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline  # noqa: E402
from vlmforge.api.memory import part_memory  # noqa: E402
from vlmforge.backends.cuda import machine  # noqa: E402
from vlmforge.backends.cuda.program import FEW  # noqa: E402

DEMO = "demo"
DEMO_CHECKPOINT = ROOT / "recipes" / "vlmforge_recipes" / "llava" / "demo" / "checkpoint"
KINDS = {
    "float16": ("--dtype", "float16"),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--dtype", "float16", "--weights", "int8"),
    "int4": ("--dtype", "float16", "--weights", "int4"),
    "fp8": ("--dtype", "float16", "--kv-dtype", "fp8"),
}
_LEAST_STEPS, _QUESTIONS = 48, 1300
_BEGIN = "<!-- engines on a GPU: written by bench/gpu_engines.py report -->\n"
_END = "<!-- end of engines on a GPU -->\n"


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
    if name == DEMO or kind not in ("float16", "bfloat16"):
        return ""
    from golden_models import TOLERANCES, Golden, cases_of, check_answer, check_images, check_prompt

    began = time.perf_counter()
    with pipeline(engine) as pipe:
        loaded = time.perf_counter()
        golden, limits = Golden(name, pipe), TOLERANCES[kind]
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


SAMPLED = {"do_sample": True, "top_k": 40, "top_p": 0.8, "temperature": 0.6, "random_seed": 1}


def speed(
    engine: Path, wanted: list[str], out: Path | None, *, sampled: bool, one_by_one: bool, few: int
) -> None:
    """A step of decoding through `pipeline()`, for each BATCH:CONTEXT of `wanted`."""
    from vlmforge.backends.cuda import chain, decoder

    chain.FEW = decoder.FEW = few  # type: ignore[misc]
    sizes = [tuple(map(int, item.split(":"))) for item in wanted]
    rate = copy_rate()
    before = machine.find_gpu()
    print(f"{before.name}: a copy moves {rate / 1e12:.2f} TB/s, read and written", flush=True)
    began = time.perf_counter()
    config = EngineConfig(
        max_batch_size=max(batch for batch, _ in sizes), enable_prefix_caching=False
    )
    with pipeline(engine, config) as pipe:
        rows: list[dict[str, Any]] = [{"card": before.name, "copy_tb_per_s": rate / 1e12}]
        rows[0]["load_s"] = time.perf_counter() - began
        print(f"loaded in {rows[0]['load_s']:.1f} s; {pipe._engine.options}", flush=True)
        rows[0] |= taken(pipe, before)
        print(rows[0], flush=True)
        watched = Watched(pipe._engine.decoder, [], [], [])
        object.__setattr__(pipe._engine, "decoder", watched)
        object.__setattr__(pipe._engine, "_sparing", watched)  # which is asked where ids will do
        object.__setattr__(pipe._engine, "overlapping", None if one_by_one else watched)
        if pipe._engine.choosing is not None:
            object.__setattr__(pipe._engine, "choosing", watched)
        read = read_bytes(pipe)
        for batch, context in sizes:
            # The first prompts decode while the last ones are still being run.
            steps = _LEAST_STEPS + 3 * batch
            prompts = [prompt(pipe, context - steps + 24, index) for index in range(batch)]
            more = SAMPLED if sampled else {}
            generation = GenerationConfig(max_new_tokens=steps, ignore_eos=True, **more)
            for _ in range(2):  # the first captures
                watched.steps.clear()
                watched.begun.clear()
                watched.prompts.clear()
                answers = pipe(prompts, gen_config=[generation] * batch, do_preprocess=False)
            rows.append(figures(watched, batch, read))
            rows[-1]["share"] = round(rows[-1]["gb_per_s"] / rate * 1e9, 3)
            rows[-1]["tokens"] = sum(len(answer.token_ids) for answer in answers)
            print(rows[-1], flush=True)
        rows[0]["taken_at_end_gb"] = (before.free - machine.find_gpu().free) / 1e9
        print(rows[0], flush=True)
    if out is not None:
        out.write_text(json.dumps(rows, indent=1), "utf-8")


def copy_rate() -> float:
    """Bytes read and written in a second by a large copy; a process of its own gives them back."""
    program = "from gpu_timing import copy_bandwidths; print(max(copy_bandwidths().values()))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT / "bench", capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def taken(pipe: Pipeline, before: machine.FoundGpu) -> dict[str, float]:
    """Gigabytes of the GPU that the engine has taken, and that it was planned to take."""
    manifest, options = pipe._engine.manifest, pipe._engine.options
    pool = options.blocks * options.block_size * manifest.kv.bytes_per_token
    planned = pool + sum(
        part_memory(part, max(options.chunk, options.slots), options.slots).total
        for part in manifest.parts
    )
    found = before.free - machine.find_gpu().free
    return {"pool_gb": pool / 1e9, "planned_gb": planned / 1e9, "taken_gb": found / 1e9}


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


def read_bytes(pipe: Pipeline) -> tuple[int, int]:
    """What a step reads: weights but for the embedding, and the cache of each token."""
    manifest = pipe._engine.manifest
    weights = manifest.part("decoder").weight_bytes
    table = 2 * manifest.decode.vocab_size * manifest.decode.hidden_size
    return weights - table, manifest.kv.bytes_per_token


def prompt(pipe: Pipeline, tokens: int, index: int) -> str:
    """A text of about so many tokens, unlike the others from its beginning on."""
    words = 16
    while True:
        text = f"{index} " + "a b c d e " * words
        found = pipe.count_tokens(text, do_preprocess=False)
        if abs(found - tokens) <= 16 or words == 1:
            return text
        words = max(1, words * tokens // found)


def report(results: Path) -> None:
    """Write what `speed` measured into RESULTS.md, between its markers."""
    head, *rows = json.loads(results.read_text("utf-8"))
    columns = ("batch", "context", "step_ms", "decoder_ms", "tokens_per_s", "share", "prefill_s")
    words = ("batch", "tokens held by each", "step, ms", "inside the decoder, ms", "tokens/s")
    words += ("share of the copy rate", "all prompts, s")
    lines = [
        f"{head['card']}, a copy moves {head['copy_tb_per_s']:.2f} TB/s. Loaded in "
        f"{head['load_s']:.1f} s; planned {head['planned_gb']:.2f} GB of its memory, took "
        f"{head['taken_gb']:.2f} GB ({head['pool_gb']:.2f} GB of them pages).",
        "",
        "| " + " | ".join(words) + " |",
        "|" + "---|" * len(words),
        *("| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows),
    ]
    document = ROOT / "bench" / "RESULTS.md"
    before, begin, rest = document.read_text("utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert begin and end, f"no {_BEGIN.strip()} ... {_END.strip()}"
    document.write_text("".join([before, begin, "\n".join(lines), "\n", end, after]), "utf-8")


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
    timed.add_argument("--sampled", action="store_true", help="and not the likeliest tokens")
    timed.add_argument("--one-by-one", action="store_true", help="no step before one has ended")
    timed.add_argument("--few", type=int, default=FEW, help="rows whose tokens the host finds")
    values = arguments.parse_args()
    if values.kind == "build":
        return build(values.engines, values.checkpoints, values.kinds)
    if values.kind == "goldens":
        sys.exit(goldens(values.engines))
    if values.kind == "report":
        return report(values.results)
    if values.kind == "accuracy":
        return accuracy(values.engines)
    if values.kind == "sampling":
        from gpu_sampling import engine

        sys.exit(min(1, sum(map(engine, values.engines))))
    return speed(
        values.engine,
        values.batch,
        values.out,
        sampled=values.sampled,
        one_by_one=values.one_by_one,
        few=values.few,
    )


if __name__ == "__main__":
    main()
