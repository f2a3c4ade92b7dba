"""Load an engine, ask, and close it, again and again: does its memory come back?

    python scripts/reopen.py [--cycles 20] [--engine ENGINE]

Resident memory is looked at after each cycle but the first, which loads libraries. Status 1 if the
last is more than 32 MiB above the second, or if anything of a pipeline is left: threads, or the
objects of its engine.
"""

from __future__ import annotations

import argparse
import gc
import sys
import threading
import weakref

from PIL import Image

from callers import resident_bytes
from fuzz import CHECKPOINT, MIB
from vlmforge import EngineConfig, GenerationConfig, pipeline
from vlmforge.limits import return_freed_memory

MOST_GROWTH = 32 * MIB
LONGEST_S = 600.0  # a thread that has not ended by then is left


def main() -> int:
    """Run the cycles."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--engine", default=str(CHECKPOINT))
    given = parser.parse_args()
    resident, left = [], 0
    for _ in range(given.cycles + 1):
        left += cycle(given.engine)
        return_freed_memory()
        resident.append(resident_bytes())
    print("resident, MiB:", *(f"{found / MIB:.1f}" for found in resident))
    growth = resident[-1] - resident[1]
    print(f"growth {growth / MIB:+.1f} MiB in {given.cycles} cycles; {left} objects left")
    return int(growth > MOST_GROWTH or left > 0)


def cycle(engine: str) -> int:
    """Load, ask in all forms, close; how many objects and threads of it are left."""
    before = threading.active_count()
    with pipeline(engine, EngineConfig(max_batch_size=4)) as pipe:
        short = GenerationConfig(max_new_tokens=8)
        picture = Image.effect_noise((300, 200), 60).convert("RGB")
        pipe(["hi", ("What is it?", picture), "and now?"], short)
        session = pipe.chat(("What is it?", picture), gen_config=short)
        next(iter(pipe.stream_infer("left in the middle", short)))
        parts = [pipe._engine, pipe._engine.decoder, pipe._scheduler, pipe._intake]
        there = [weakref.ref(part) for part in parts if hasattr(type(part), "__weakref__")]
    assert len(there) >= 3
    del pipe, parts, session
    for thread in threading.enumerate():  # those that prepare end when they can
        if thread.name in ("vlmforge", "vlmforge-prepare"):
            thread.join(LONGEST_S)
    gc.collect()
    # Those that decode images belong to the process.
    names = [thread.name for thread in threading.enumerate()]
    decoding = sum(name.startswith("vlmforge-decode") for name in names)
    return sum(one() is not None for one in there) + max(0, len(names) - before - decoding)


if __name__ == "__main__":
    sys.exit(main())
