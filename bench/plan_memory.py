"""Trace and lay out a decoder of a published shape, and print the seconds and the peak memory.

No weights are needed: this is all of a build but the copying of weights, which takes the memory of
one tensor at a time whatever their number (`build_memory.py` measures whole builds).

python bench/plan_memory.py --size 34b
"""

from __future__ import annotations

import argparse
import resource
import time

from vlmforge_builder.blocks.decoder import DecoderConfig
from vlmforge_builder.export import trace
from vlmforge_builder.weights import AsDtype, plan, stored_dtype
from vlmforge_recipes.llama_decoder import decoder_part


def config(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> DecoderConfig:
    """A decoder with heads of `hidden / heads` numbers and a window of 4096 tokens."""
    head_dim = hidden // heads
    sizes = (vocab, hidden, inner, layers, heads, kv_heads, head_dim)
    return DecoderConfig(*sizes, 1e-5, 10000.0, "silu", 4096)


SIZES = {
    "7b": config(4096, 11008, 32, 32, 32, 32000),
    "13b": config(5120, 13824, 40, 40, 40, 32000),
    "34b": config(7168, 20480, 60, 56, 8, 64000),
}


def main() -> None:
    """Print one line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--size", default="34b", choices=tuple(SIZES))
    size = arguments.parse_args().size
    part = decoder_part(SIZES[size], prefix="model.", head="lm_head.weight")
    start = time.perf_counter()
    traced = trace(part)
    stored = (stored_dtype(part.weights[name], "float16") for name in traced.shapes)
    encodings = dict(zip(traced.shapes, map(AsDtype, stored), strict=True))
    layout = plan(traced.shapes, encodings)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    places = [place for item in layout for place in item.places]
    total, largest = places[-1].end, max(place.tensor.size for place in places)
    print(
        f"{size}: {total / 1e9:.1f} GB of weights planned in {seconds:.1f} s, peak RSS "
        f"{peak / 2**30:.2f} GiB; largest tensor {largest / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
