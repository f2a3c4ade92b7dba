"""Whole engines on a GPU: do golden checkpoints answer as they should, and how fast is a step?

    python3 bench/gpu_engines.py goldens ENGINES        # folders named CHECKPOINT.DTYPE
    python3 bench/gpu_engines.py speed ENGINE --batch 1:640 8:1024 --out results.json

Needs what serving needs, and for `goldens` pytest too; no torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "runtime"), str(ROOT / "plugins_cuda")]
sys.path[:0] = [str(ROOT / "builder"), str(ROOT / "recipes")]

from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline  # noqa: E402
from vlmforge.backends.cuda import machine  # noqa: E402

_LEAST_STEPS = 48


def goldens(engines: Path) -> int:
    """Every case of every golden checkpoint; the number of those that failed."""
    from golden_models import TOLERANCES, Golden, cases_of, check_answer, check_images, check_prompt

    failed = 0
    for engine in sorted(path for path in engines.iterdir() if (path / "engine.json").exists()):
        name, dtype = engine.name.rsplit(".", 1)
        began = time.perf_counter()
        try:
            with pipeline(engine) as pipe:
                loaded = time.perf_counter()
                golden, limits = Golden(name, pipe), TOLERANCES[dtype]
                check_images(golden, limits)
                cases = [case["id"] for case in cases_of(name)]
                for case in cases:
                    check_prompt(golden, case)
                    check_answer(golden, case, limits)
            words = f"{len(cases)} cases equal the goldens; loaded in {loaded - began:.1f} s"
        except Exception:  # noqa: BLE001 - the others are to be seen too
            failed += 1
            words = "FAILED\n" + "\n".join(traceback.format_exc().splitlines()[-25:])
        print(f"{engine.name}: {words}, {time.perf_counter() - began:.1f} s in all", flush=True)
    return failed


@dataclass
class Watched:
    """A decoder that notes when each step began and ended, and of how many rows it was."""

    inner: Any
    steps: list[tuple[float, float, int, int]]

    def step(self, batch: Any) -> Any:
        """As a decoder does."""
        began = time.perf_counter()
        logits = self.inner.step(batch)
        self.steps.append((began, time.perf_counter(), *batch.input_ids.shape))
        return logits

    def move(self, move: Any) -> None:
        """As a decoder does."""
        self.inner.move(move)


def speed(engine: Path, wanted: list[str], out: Path | None) -> None:
    """A step of decoding through `pipeline()`, for each BATCH:CONTEXT of `wanted`."""
    sizes = [tuple(map(int, item.split(":"))) for item in wanted]
    began = time.perf_counter()
    config = EngineConfig(
        max_batch_size=max(batch for batch, _ in sizes), enable_prefix_caching=False
    )
    with pipeline(engine, config) as pipe:
        rows: list[dict[str, Any]] = [{"load_s": time.perf_counter() - began}]
        print(f"loaded in {rows[0]['load_s']:.1f} s; {pipe._engine.options}", flush=True)
        gpu = machine.find_gpu()
        print(f"{gpu.name}: {gpu.free / 1e9:.2f} of {gpu.total / 1e9:.2f} GB free", flush=True)
        watched = Watched(pipe._engine.decoder, [])
        object.__setattr__(pipe._engine, "decoder", watched)
        read = read_bytes(pipe)
        for batch, context in sizes:
            # The first prompts decode while the last ones are still being run.
            steps = _LEAST_STEPS + 3 * batch
            prompts = [prompt(pipe, context - steps, index) for index in range(batch)]
            generation = GenerationConfig(max_new_tokens=steps, ignore_eos=True)
            for _ in range(2):  # the first captures
                watched.steps.clear()
                answers = pipe(prompts, gen_config=[generation] * batch, do_preprocess=False)
            rows.append(figures(watched.steps, batch, context, read))
            rows[-1]["tokens"] = sum(len(answer.token_ids) for answer in answers)
            print(rows[-1], flush=True)
        free = machine.find_gpu().free
        print(f"{free / 1e9:.2f} GB free at the end", flush=True)
    if out is not None:
        out.write_text(json.dumps(rows, indent=1), "utf-8")


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


def figures(
    steps: list[tuple[float, float, int, int]], batch: int, context: int, read: tuple[int, int]
) -> dict[str, Any]:
    """Medians in milliseconds: of a whole step, from its beginning to the next, and inside."""
    full = [(a, b) for a, b in itertools.pairwise(steps) if a[2:] == b[2:] == (batch, 1)]
    whole = statistics.median(b[0] - a[0] for a, b in full) * 1e3
    inside = statistics.median(a[1] - a[0] for a, _ in full) * 1e3
    bytes_read = read[0] + batch * context * read[1]
    prefill = [end - start for start, end, _, tokens in steps if tokens > 1]
    return {
        "batch": batch,
        "context": context,
        "step_ms": round(whole, 3),
        "decoder_ms": round(inside, 3),
        "tokens_per_s": round(batch / whole * 1e3, 1),
        "gb_per_s": round(bytes_read / whole / 1e6, 1),
        "prefill_s": round(sum(prefill), 4),
        "steps": len(full),
    }


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    kinds = arguments.add_subparsers(dest="kind", required=True)
    kinds.add_parser("goldens").add_argument("engines", type=Path)
    timed = kinds.add_parser("speed")
    timed.add_argument("engine", type=Path)
    timed.add_argument("--batch", nargs="+", default=["1:640", "8:1024", "32:1024", "64:1024"])
    timed.add_argument("--out", type=Path)
    values = arguments.parse_args()
    if values.kind == "goldens":
        sys.exit(goldens(values.engines))
    speed(values.engine, values.batch, values.out)


if __name__ == "__main__":
    main()
