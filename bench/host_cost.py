"""What the host does for many requests at once, where the device does nothing and is never late.

    python bench/host_cost.py ENGINE [--together 128] [--prompt 640] [--answer 128] [--profile]

All code of the backend `cuda` runs but the driver's; segments and kernels are not run, so every
token has the id 0. What is left of the time is the host's share of a run on a GPU, on a processor
of this kind: it is hidden as long as a step takes the device longer.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from typing_extensions import override

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("runtime", "plugins_cuda")]

from timeline import Steps  # noqa: E402
from vlmforge import EngineConfig, GenerationConfig, pipeline  # noqa: E402
from vlmforge.backends import cuda  # noqa: E402
from vlmforge.backends.cuda.device import Segment, Tensor, Work  # noqa: E402
from vlmforge.backends.fake import (  # noqa: E402
    HostBackend,
    HostDevice,
    HostMemory,
    NumpyKernels,
)
from vlmforge.backends.fake_memory import bits_of  # noqa: E402
from vlmforge.engine.interface import LIKELIEST  # noqa: E402
from vlmforge.scheduler.loop import Loop  # noqa: E402
from vlmforge_plugins.cached_attention.launcher import Params  # noqa: E402
from vlmforge_plugins.cached_attention.plan import Launch  # noqa: E402


class _NoSegment(Segment):
    @override
    def bind(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Work:
        del inputs
        ids = [bits_of(tensor) for tensor in outputs if tensor.name == LIKELIEST.name]

        def work() -> None:
            for one in ids:
                one[:] = 0

        return work


class _NoKernels(NumpyKernels):
    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        del launch, params, stream


class IdleDevice(HostDevice):
    """Memory of zeros, and nothing that is calculated in it."""

    @override
    def allocate(self, size: int) -> HostMemory:
        kept = np.zeros(size + 256, np.uint8)
        return HostMemory(kept.ctypes.data + -kept.ctypes.data % 256, kept)

    @override
    def segment(self, file: Path) -> Segment:
        return _NoSegment()


class _Backend(HostBackend):
    @override
    def device(self, number: int = 0) -> HostDevice:
        return IdleDevice(_NoKernels)


@contextmanager
def idle() -> Iterator[None]:
    """Engines of the backend `cuda` that are loaded within the block calculate nothing."""
    real, cuda.BACKEND = cuda.BACKEND, _Backend()
    try:
        yield
    finally:
        cuda.BACKEND = real


@contextmanager
def profiled() -> Iterator[cProfile.Profile]:
    """The thread of the worker that is started within the block."""
    found, work = cProfile.Profile(), Loop._work

    def noted(loop: Loop) -> None:
        found.runcall(work, loop)

    Loop._work = noted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Loop._work = work  # type: ignore[method-assign]


def run(engine: Path, together: int, prompt: int, answer: int) -> None:
    """One burst that is not counted, and one that is."""
    config = EngineConfig(
        session_len=prompt + answer + 64, max_batch_size=together, enable_prefix_caching=False
    )
    generation = GenerationConfig(max_new_tokens=answer, ignore_eos=True)
    with idle(), pipeline(engine, config) as pipe:
        texts = [f"{index} " + "a " * (prompt - 8) for index in range(together)]
        tokens = pipe.count_tokens(texts[0], do_preprocess=False)
        for count in (together, 1, together):
            with Steps() as steps:
                began, cpu = time.perf_counter(), time.process_time()
                found = pipe(texts[:count], generation, do_preprocess=False)
                wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            assert {r.generate_token_len for r in found} == {answer}, found[0]
            begins = [record.begun for record in steps.records]
            prompts = [record for record in steps.records if record.step.prompts]
            print(
                f"{count} requests of {tokens} + {answer}: {wall:.2f} s, {cpu:.2f} s CPU; "
                f"{len(begins)} steps, {len(prompts)} with prompts; the first begins after "
                f"{(begins[0] - began) * 1e3:.1f} ms, the last prompt after "
                f"{(prompts[-1].begun - began) * 1e3:.0f} ms",
                flush=True,
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--together", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=640)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--profile", action="store_true", help="of the worker")
    given = parser.parse_args()
    asked = given.engine, given.together, given.prompt, given.answer
    if not given.profile:
        run(*asked)
        return
    with profiled() as found:
        run(*asked)
    pstats.Stats(found).sort_stats("tottime").print_stats(28)


if __name__ == "__main__":
    main()
