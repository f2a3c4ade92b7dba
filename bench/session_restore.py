"""What restoring a saved session costs, as a share of running its prompt again.

    python bench/session_restore.py --size 1b --work out/bench

Conversations about one picture each are saved by one pipeline with their cache and without it; a
second pipeline, which knows none of them, loads each and takes one more turn. Both sides are timed
in turn, on the same machine in the same run; figures are medians over the conversations.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, Session, pipeline
from vlmforge_recipes.llava.synthetic import PRESETS, write_checkpoint

ONE = GenerationConfig(max_new_tokens=1, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Restored:
    """Seconds of `Session.load`, and those until the next turn's first token; and that turn."""

    load: float
    turn: float
    response: Response


def engine_of(size: str, work: Path) -> Path:
    """The engine of a synthetic checkpoint; both are made if they are not there."""
    checkpoint, engine = work / f"{size}.checkpoint", work / f"{size}.engine"
    if not engine.exists():
        if not checkpoint.exists():
            write_checkpoint(checkpoint, PRESETS[size])
        build = Path(sys.executable).with_name("build-engine")
        subprocess.run([build, checkpoint, "-o", engine], check=True)
    return engine


def answer(pipe: Pipeline, prompt: object, session: Session) -> Response:
    pipe.chat(prompt, session, ONE)
    assert session.response is not None
    return session.response


def talk(pipe: Pipeline, seed: int) -> Session:
    """A turn about a picture that no cache has seen, and one more."""
    pixels = np.random.default_rng(seed).integers(0, 256, (480, 640, 3), np.uint8)
    session = pipe.session()
    answer(pipe, ("What is shown in this picture?", Image.fromarray(pixels)), session)
    answer(pipe, "What else is there?", session)
    return session


def restore(pipe: Pipeline, path: Path) -> Restored:
    begin = time.perf_counter()
    session = Session.load(path, pipe)
    loaded = time.perf_counter()
    response = answer(pipe, "Are you sure?", session)
    return Restored(loaded - begin, time.perf_counter() - loaded, response)


def measure(engine: Path, work: Path, rounds: int) -> None:
    """Print the table."""
    config = EngineConfig(max_batch_size=2)
    # Another conversation for each side, in turn: the caches of the second pipeline know none.
    paths = [work / f"{number}.session" for number in range(2 * rounds)]
    saves, tokens = list[float](), 0
    with pipeline(engine, backend_config=config) as pipe:
        for number, path in enumerate(paths):
            session = talk(pipe, number)
            begin = time.perf_counter()
            saved = session.save(path, cache=number % 2 == 0)
            if saved:
                saves.append(time.perf_counter() - begin)
                tokens = saved
    size = paths[0].stat().st_size
    with pipeline(engine, backend_config=config) as pipe:
        answer(pipe, "Warm up.", pipe.session())
        found = [restore(pipe, path) for path in paths]
    for path in paths:
        path.unlink()
    report(tokens, size, statistics.median(saves), found[::2], found[1::2])


def report(
    tokens: int, size: int, save: float, kept: list[Restored], again: list[Restored]
) -> None:
    def median(found: list[Restored], name: str) -> float:
        return statistics.median(getattr(one, name) for one in found)

    timings = [one.response.timings for one in again]
    prefill = statistics.median(t.prefill for t in timings if t is not None)
    encode = statistics.median(t.encode for t in timings if t is not None)
    load = median(kept, "load")
    print(f"{tokens} tokens in a file of {size / 1e6:.1f} MB, saved in {save:.3f} s")
    print(f"load with cache            {load:8.3f} s")
    print(f"next turn's first token    {median(kept, 'turn'):8.3f} s")
    print(f"load without cache         {median(again, 'load'):8.3f} s")
    print(f"next turn's first token    {median(again, 'turn'):8.3f} s", end="")
    print(f", of it prefill {prefill:.3f} s and encoding {encode:.3f} s")
    cached = [one.response.cached_tokens for one in kept]
    print(f"cached tokens of the next turn: {min(cached)} with, ", end="")
    print(f"{max(one.response.cached_tokens for one in again)} without")
    print(f"restoring costs {load / prefill:.1%} of the prefill, encoding not counted")


def main() -> None:
    """Measure one size."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--size", default="1b", choices=tuple(PRESETS))
    arguments.add_argument("--engine", type=Path, help="an engine that is there already")
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--rounds", type=int, default=3)
    values = arguments.parse_args()
    values.work.mkdir(parents=True, exist_ok=True)
    engine = values.engine or engine_of(values.size, values.work)
    measure(engine, values.work, values.rounds)


if __name__ == "__main__":
    main()
