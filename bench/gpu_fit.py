"""Whether engines take the memory of a GPU that was planned; what is said where they do not fit.

    python3 bench/gpu_fit.py planned ENGINE ... --out results.jsonl
    python3 bench/gpu_fit.py refused ENGINE        # little memory left; a prompt that is too long
    python3 bench/gpu_fit.py full ENGINE           # a pool for a few requests, and many more

Weights may be holes (`hollow.py trust`): memory does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

from gpu_results import Results, attempts
from gpu_soak import held_pages
from gpu_steps import picture, text_of
from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline
from vlmforge.api.plan import CONTEXT_BYTES, Plan, plan
from vlmforge.backends.cuda import machine
from vlmforge.engine.manifest import load_manifest
from vlmforge.errors import BackendUnavailableError, ContextLengthError, VlmforgeError

_LEFT = 6 << 30


def planned(engine: Path, results: Results) -> None:
    """What was planned and what is taken, when the largest steps have been run."""
    manifest, config = load_manifest(engine), EngineConfig(enable_prefix_caching=False)
    gc.collect()
    before = machine.find_gpu()  # the driver's own is taken already
    expected = plan(manifest, config, before.free + CONTEXT_BYTES)
    shown = {
        "engine": engine.name,
        "weights_gb": sum(part.weights for part in expected.parts) / 1e9,
        "driver_gb": (before.total - before.free) / 1e9,
        "planned_driver_gb": CONTEXT_BYTES / 1e9,
    }
    if expected.cache is None:
        results.add(
            "planned", **shown, fits=False, **_refusal(expected), **_loading(engine, config)
        )
        return
    with pipeline(engine, config) as pipe:
        loaded = before.free - machine.find_gpu().free
        blocks = pipe._engine.options.blocks
        _largest(pipe)
        taken = before.free - machine.find_gpu().free
    total = planned_bytes(expected)
    results.add(
        "planned",
        **shown,
        fits=True,
        cache_gb=expected.cache.bytes / 1e9,
        planned_gb=total / 1e9,
        loaded_gb=loaded / 1e9,
        taken_gb=taken / 1e9,
        off=taken / total - 1,
        blocks=blocks,
        planned_blocks=expected.cache.blocks,
    )


def planned_bytes(expected: Plan) -> int:
    """What an engine takes beside the driver."""
    assert expected.cache is not None
    parts = sum(part.weights + part.activations + part.library for part in expected.parts)
    return parts + expected.cache.bytes


def _refusal(expected: Plan) -> dict[str, str]:
    assert expected.refusal is not None
    return {"found": expected.refusal.found, "change": "; ".join(expected.refusal.changes)}


def _loading(engine: Path, config: EngineConfig) -> dict[str, str]:
    """The error that loading ends with: the plan's."""
    try:
        pipeline(engine, config).close()
    except BackendUnavailableError as error:
        return {"said": str(error)}
    raise AssertionError("it was loaded, though the plan says that it does not fit")


def _largest(pipe: Pipeline) -> None:
    """A prompt of a whole chunk beside as many others as there are places, choices of all kinds.

    And as many pictures as are encoded at once, and more.
    """
    slots, window = pipe._engine.options.slots, pipe.session_len
    texts = [text_of(pipe, min(800, window - 40), 0), *(f"number {i}" for i in range(1, slots))]
    drawn = GenerationConfig(
        max_new_tokens=16, ignore_eos=True, top_k=40, top_p=0.8, temperature=0.7, random_seed=1
    )
    for generation in (GenerationConfig(max_new_tokens=16, ignore_eos=True), drawn):
        answers = pipe(texts, generation, do_preprocess=False)
        assert isinstance(answers, list)
        assert all(len(answer.token_ids) == 16 for answer in answers), answers[0]
    if window > 1024:
        shown = pipe(
            [("what?", picture(index)) for index in range(24)], GenerationConfig(max_new_tokens=2)
        )
        assert isinstance(shown, list)
        assert not [answer for answer in shown if answer.finish_reason == "error"], shown[0]


def refused(engine: Path, results: Results) -> None:
    """Errors in their words: a GPU full of something else, and a prompt that is too long."""
    from vlmforge.backends.cuda.gpu import GpuMemory, enter

    enter()
    gc.collect()
    taken = GpuMemory(machine.find_gpu().free - _LEFT, 0)
    said = ""
    try:
        pipeline(engine).close()
    except VlmforgeError as error:
        said = f"{type(error).__name__}: {error}"
    del taken
    gc.collect()
    results.add("refused", engine=engine.name, case="full GPU", said=said)
    assert said, "it was loaded into nothing"
    with pipeline(engine, EngineConfig(max_batch_size=1, session_len=512)) as pipe:
        try:
            pipe("a " * 600, GenerationConfig(max_new_tokens=64))
        except ContextLengthError as error:
            said = f"{type(error).__name__}: {error}"
    results.add("refused", engine=engine.name, case="long prompt", said=said)
    assert said.startswith("ContextLengthError"), said


def full(engine: Path, results: Results, requests: int = 24, tokens: int = 400) -> None:
    """Places are lost and found again, and every answer comes whole."""
    manifest = load_manifest(engine)
    window = 1024
    wanted = max(3 * (200 + tokens), window + 128) * manifest.kv.bytes_per_token
    few = EngineConfig(max_batch_size=requests, session_len=window, enable_prefix_caching=False)
    expected = plan(manifest, few, machine.find_gpu().free + CONTEXT_BYTES)
    assert expected.cache is not None
    parts = sum(part.weights + part.activations + part.library for part in expected.parts)
    share = wanted / (machine.find_gpu().free - parts)
    few = dataclasses.replace(few, cache_max_entry_count=share)
    with pipeline(engine, few) as pipe:
        texts = [text_of(pipe, 200, index) for index in range(requests)]
        generation = GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
        answers = pipe(texts, generation, do_preprocess=False)
        assert isinstance(answers, list)
        blocks, left, found = pipe._engine.options.blocks, held_pages(pipe), pipe.metrics()
    lengths = sorted({len(answer.token_ids) for answer in answers})
    results.add(
        "full",
        engine=engine.name,
        requests=requests,
        pool_tokens=blocks * 64,
        asked_tokens=requests * (200 + tokens),
        preemptions=found.preemptions,
        errors=sum(found.errors.values()),
        blocks_left=left,
        lengths=str(lengths),
    )
    assert lengths == [tokens] and found.preemptions and not left


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("planned", "refused", "full"))
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results = Results(given.out)
    kinds: dict[str, Callable[[Path, Results], None]] = {
        "planned": planned,
        "refused": refused,
        "full": full,
    }

    def work(engine: Path) -> Callable[[], None]:
        return lambda: kinds[given.kind](engine, results)

    attempts([(f"{given.kind} {engine.name}", work(engine)) for engine in given.engines])


if __name__ == "__main__":
    main()
