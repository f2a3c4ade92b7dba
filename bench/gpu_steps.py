"""How fast a large engine's steps are on a GPU, through `pipeline()`; and what the host costs.

    python3 bench/gpu_steps.py card                            # what the card itself can do
    python3 bench/gpu_steps.py decode ENGINE --batch 1:640 8:1024 32:1024 64:1024
    python3 bench/gpu_steps.py prompts ENGINE                  # prefill, and first tokens

Greedy, prefix caching off, all requests at once. A step is from the beginning of one to that of the
next, in which all rows decode. What the GPU did meanwhile is told by events around every graph that
is launched: what is between them, copies included, counts as idle. `--out FILE` appends rows.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("runtime", "plugins_cuda")]

from gpu_results import Results, Row, attempts, middle, seconds_of  # noqa: E402
from timeline import Steps  # noqa: E402
from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline  # noqa: E402
from vlmforge.backends.cuda import chain, machine  # noqa: E402
from vlmforge.backends.cuda import decoder as paged  # noqa: E402
from vlmforge.engine.manifest import Manifest, load_manifest  # noqa: E402
from vlmforge.runner.step import StepRecord  # noqa: E402

CHUNK = 2048
DEFAULT = ("1:640", "8:1024", "32:1024", "64:1024")
_LEAST_STEPS = 48


def card(results: Results) -> None:
    """Ceilings of the card, by torch in a process of its own, which gives the memory back."""
    program = (
        "import torch; from gpu_timing import copy_bandwidths, matmul_rate;"
        "print(max(copy_bandwidths().values()), matmul_rate(torch.float16))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT / "bench", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    copy, matmul = map(float, done.stdout.split()[-2:])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    found = machine.find_gpu()
    results.add(
        "card",
        card=found.name,
        driver=driver,
        onnxruntime=machine.installed_onnxruntime(),
        memory_gb=found.total / 1e9,
        copy_tb_per_s=copy / 1e12,
        matmul_tflop_per_s=matmul / 1e12,
    )


# --- what the GPU did -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stamp:
    """A graph that was launched: when by the host's clock, and what tells how long it ran."""

    at: float
    begin: Any
    end: Any

    @property
    def seconds(self) -> float:
        """It must have ended."""
        from cuda.bindings import driver

        from vlmforge_plugins.cached_attention.driver import call

        return float(call(driver.cuEventElapsedTime, self.begin, self.end)) / 1e3


@contextmanager
def stamped() -> Iterator[list[Stamp]]:
    """Notes every graph that is launched in the block; nothing where there is no GPU."""
    stamps: list[Stamp] = []
    try:
        from vlmforge.backends.cuda import gpu
    except ImportError:
        yield stamps
        return
    from cuda.bindings import driver

    from vlmforge_plugins.cached_attention.driver import call

    plain = gpu._Replay.__call__

    def noted(replay: Any) -> None:
        begin, end = call(driver.cuEventCreate, 0), call(driver.cuEventCreate, 0)
        at = time.perf_counter()
        call(driver.cuEventRecord, begin, replay._stream)
        plain(replay)
        call(driver.cuEventRecord, end, replay._stream)
        stamps.append(Stamp(at, begin, end))

    gpu._Replay.__call__ = noted  # type: ignore[method-assign]
    try:
        yield stamps
    finally:
        gpu._Replay.__call__ = plain  # type: ignore[method-assign]


def busy(stamps: Sequence[Stamp], begin: float, end: float) -> float:
    """Seconds that graphs ran which were launched between two moments."""
    return sum(stamp.seconds for stamp in stamps if begin <= stamp.at < end)


# --- decoding -------------------------------------------------------------------------------------


def decode(
    engine: Path,
    wanted: Sequence[str],
    results: Results,
    *,
    one_by_one: bool = False,
    sampled: bool = False,
) -> None:
    """A step of decoding, for each BATCH:CONTEXT of `wanted`."""
    sizes = [(int(batch), int(context)) for batch, context in (w.split(":") for w in wanted)]
    before = machine.find_gpu()
    with opened(engine, max(batch for batch, _ in sizes), results) as pipe:
        if one_by_one:
            object.__setattr__(pipe._engine, "overlapping", None)
        for batch, context in sizes:
            row = decoded(pipe, engine.name, batch, context, sampled=sampled)
            results.add("sampled" if sampled else "decode", **row)
        taken = before.free - machine.find_gpu().free
        results.add("taken", engine=engine.name, taken_gb=taken / 1e9)


@contextmanager
def opened(engine: Path, slots: int, results: Results) -> Iterator[Pipeline]:
    """A pipeline that caches no prefixes; says how long loading took."""
    config = EngineConfig(
        max_batch_size=slots, enable_prefix_caching=False, max_prefill_token_num=CHUNK
    )
    began = time.perf_counter()
    with pipeline(engine, config) as pipe:
        loaded = time.perf_counter() - began
        results.add("load", engine=engine.name, load_s=loaded, options=str(pipe._engine.options))
        yield pipe


def decoded(pipe: Pipeline, engine: str, batch: int, context: int, *, sampled: bool = False) -> Row:
    """Medians over the steps in which all rows decode, greedily or not."""
    # The first prompts decode while the last ones are still being run.
    steps = _LEAST_STEPS + 3 * batch
    prompts = [text_of(pipe, context - steps + 24, index) for index in range(batch)]
    settings: dict[str, Any] = {"top_k": 40, "top_p": 0.8, "random_seed": 1} if sampled else {}
    generation = GenerationConfig(max_new_tokens=steps, ignore_eos=True, **settings)
    ask(pipe, prompts, generation)  # captures
    with Steps() as noted, stamped() as stamps:
        ask(pipe, prompts, generation)
        row = figures(noted.records, stamps, batch)
    read = step_bytes(pipe.manifest, batch, row["context"])
    rate = round(read / row["step_ms"] / 1e6, 1)
    return {"engine": engine, **row, "gb": round(read / 1e9, 3), "gb_per_s": rate}


def ask(pipe: Pipeline, prompts: list[str], generation: GenerationConfig) -> None:
    """All at once; each must be answered to its length."""
    answers = pipe(prompts, generation, do_preprocess=False)
    assert isinstance(answers, list)
    lengths = {len(answer.token_ids) for answer in answers}
    assert lengths == {generation.max_new_tokens}, (lengths, answers[0])


def figures(records: Sequence[StepRecord], stamps: Sequence[Stamp], batch: int) -> Row:
    """Of the steps in which `batch` rows decode and nothing else is done."""

    def full(record: StepRecord) -> bool:
        return len(record.step.decode) == batch and not record.step.prompts

    pairs = [(a, b) for a, b in itertools.pairwise(records) if full(a) and full(b)]
    assert pairs, f"no two steps of {batch} rows one after the other"
    whole = [b.begun - a.begun for a, b in pairs]
    ran = sum(busy(stamps, a.begun, b.begun) for a, b in pairs)
    held = sum(row.stop for a, _ in pairs for row in a.step.decode) / len(pairs) / batch
    prompts = [record.prompt for record in records if record.step.prompts]
    return {
        "batch": batch,
        "context": round(held),
        "step_ms": round(middle(whole) * 1e3, 3),
        "gpu_ms": round(ran / len(pairs) * 1e3, 3),
        "idle": round(1 - ran / sum(whole), 4),
        "tokens_per_s": round(batch / middle(whole), 1),
        "prompts_s": round(sum(prompts), 4),
        "steps": len(pairs),
    }


def step_bytes(manifest: Manifest, batch: int, context: int) -> int:
    """What a step must read: weights but for the embedding, and the cache of each token."""
    return read_weights(manifest) + batch * context * manifest.kv.bytes_per_token


def read_weights(manifest: Manifest) -> int:
    """Bytes of the decoder's weights that every step reads."""
    table = 2 * manifest.decode.vocab_size * manifest.decode.hidden_size
    return manifest.part("decoder").weight_bytes - table


def text_of(pipe: Pipeline, tokens: int, index: int, image: Image.Image | None = None) -> Any:
    """A prompt of so many tokens, unlike the others from its beginning on.

    With an image it goes through the template, and the image's tokens are among them.
    """

    def made(words: int) -> tuple[Any, int]:
        text = f"{index} " + "a " * words
        asked = text if image is None else (text, image)
        return asked, pipe.count_tokens(asked, do_preprocess=image is not None)

    few, more = made(8)[1], made(40)[1]
    words = 8 + max(0, round((tokens - few) * 32 / (more - few)))
    asked, found = made(words)
    while found > tokens and words > 1:
        words -= 1
        asked, found = made(words)
    assert abs(found - tokens) <= 4, (found, tokens)
    return asked


# --- prompts --------------------------------------------------------------------------------------


def prompts(engine: Path, results: Results) -> None:
    """Seconds to the first token: a prompt of 640 and of 2048 tokens, and one with an image."""
    manifest, layers = load_manifest(engine), load_manifest(engine).kv
    width = layers.kv_heads * layers.head_dim
    with opened(engine, 8, results) as pipe:
        for tokens in (640, CHUNK):
            texts = [text_of(pipe, tokens, index) for index in range(9)]
            times, inside = first_tokens(pipe, texts, do_preprocess=False)
            # Products of all layers for each token, and both of attention for half of all pairs.
            head = 2 * manifest.decode.vocab_size * manifest.decode.hidden_size
            products = (read_weights(manifest) - head) * tokens
            attention = 4 * layers.layers * width * tokens**2 / 2
            results.add(
                "prefill",
                engine=engine.name,
                case=tokens,
                first_token_ms=times * 1e3,
                prefill_ms=inside * 1e3,
                tflop=(products + attention) / 1e12,
                tflop_per_s=(products + attention) / inside / 1e12,
            )
        asked = [text_of(pipe, 576 + 64, index, picture(index)) for index in range(11)]
        times, inside = first_tokens(pipe, asked)
        results.add(
            "image",
            engine=engine.name,
            tokens=pipe.count_tokens(asked[0]),
            first_token_ms=times * 1e3,
            prefill_ms=inside * 1e3,
        )


def first_tokens(
    pipe: Pipeline, asked: Sequence[Any], *, do_preprocess: bool = True
) -> tuple[float, float]:
    """Median seconds of a whole answer of one token, and of its prompt inside; but for the first.

    The first two load what libraries load late.
    """
    one = GenerationConfig(max_new_tokens=1, ignore_eos=True)
    times, inside = [], []
    for prompt in asked:
        with Steps() as noted:
            times.append(seconds_of(lambda p=prompt: pipe(p, one, do_preprocess)))
            inside.append(sum(record.prompt for record in noted.records))
    return middle(times[2:]), middle(inside[2:])


def picture(seed: int, size: int = 336) -> Image.Image:
    """Noise, another for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(pixels)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("card", "decode", "prompts"))
    parser.add_argument("engine", type=Path, nargs="?")
    parser.add_argument("--batch", nargs="+", default=list(DEFAULT), metavar="BATCH:CONTEXT")
    parser.add_argument("--one-by-one", action="store_true", help="no step before one has ended")
    parser.add_argument("--sampled", action="store_true", help="top-k 40 and top-p 0.8")
    parser.add_argument("--again", type=int, default=0, help="opened anew so often, in one process")
    parser.add_argument("--few", type=int, help="rows whose likeliest tokens the host finds")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results, engine = Results(given.out), given.engine
    if given.few is not None:
        chain.FEW = paged.FEW = given.few  # type: ignore[misc]
    if given.kind != "card" and engine is None:
        parser.error(f"{given.kind} needs an engine")
    works: dict[str, Callable[[], object]] = {
        "card": lambda: card(results),
        "decode": lambda: decode(
            engine, given.batch, results, one_by_one=given.one_by_one, sampled=given.sampled
        ),
        "prompts": lambda: prompts(engine, results),
    }
    name = f"{given.kind} {engine.name if engine else ''}".strip()
    attempts([(name, works[given.kind])] * (1 + given.again))


if __name__ == "__main__":
    main()
