"""Load an engine, ask it about a picture, and print the seconds and the peak memory.

python bench/answer.py out/bench/smolvlm2-2.2b.float32.onnxruntime.int4.engine
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import PIL.Image

from vlmforge import GenerationConfig, pipeline


def main() -> None:
    """One prompt, one picture, so many tokens."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("engine", type=Path)
    arguments.add_argument("--tokens", type=int, default=16)
    arguments.add_argument("--picture", type=int, nargs=2, default=(640, 480))
    values = arguments.parse_args()
    width, height = values.picture
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    begun = time.perf_counter()
    with pipeline(values.engine) as pipe:
        print(f"loaded in {time.perf_counter() - begun:.1f} s")
        begun = time.perf_counter()
        config = GenerationConfig(max_new_tokens=values.tokens, ignore_eos=True)
        found = pipe(("What is shown here?", PIL.Image.fromarray(noise)), gen_config=config)
        assert not isinstance(found, list)
        print(
            f"{found.input_token_len} tokens of a prompt with a picture of {width}x{height}, "
            f"{found.generate_token_len} tokens answered in {time.perf_counter() - begun:.1f} s"
        )
        print(found.timings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak RSS with mapped files {peak:.2f} GiB")


if __name__ == "__main__":
    main()
