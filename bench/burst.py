"""Answers bursts of prompts, by calls that every version has; see `before.py`.

The first line of its output says how long loading took. Then each line of its input is JSON
`{"prompts": [...], "image": path or null, "tokens": n, "twice": true or false}`, and each answer is
JSON: milliseconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

from PIL import Image

from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline


def burst(
    pipe: Pipeline, prompts: list[str], image: str | None, tokens: int
) -> dict[str, float | str]:
    """Ask all prompts at once; each answer has exactly `tokens` tokens."""
    asked = prompts if image is None else [(text, Image.open(image)) for text in prompts]
    config = GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
    begin, cpu = time.perf_counter(), time.process_time()
    answers = pipe(asked, gen_config=config)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    times = [answer.timings for answer in answers]
    return {
        "wall": wall * 1e3,
        "cpu": cpu * 1e3,
        "first": statistics.fmean(time.total - time.decode for time in times) * 1e3,
        "step": statistics.fmean(time.decode for time in times) / max(1, tokens - 1) * 1e3,
        "text": "|".join(answer.text for answer in answers),
    }


def both(
    pipe: Pipeline, prompts: list[str], image: str | None, tokens: int, *, twice: bool
) -> dict[str, float | str]:
    """The same; if `twice`, of one half of the prompts, and of the other twice as many tokens.

    What these take longer are steps of all rows. Between two tokens of one answer others' prompts
    are run too, and fewer rows at either end.
    """
    if not twice:
        return burst(pipe, prompts, image, tokens)
    half = len(prompts) // 2
    found = burst(pipe, prompts[:half], image, tokens)
    longer = burst(pipe, prompts[half:], image, 2 * tokens)
    found["together"] = (float(longer["wall"]) - float(found["wall"])) / tokens
    return found


def main() -> None:
    """Serve until the end of standard input."""
    engine, threads = sys.argv[1], int(sys.argv[2]) or None
    begin = time.perf_counter()
    pipe = pipeline(engine, backend_config=EngineConfig(max_batch_size=8, threads=threads))
    print(json.dumps({"load": (time.perf_counter() - begin) * 1e3}), flush=True)
    for line in sys.stdin:
        print(json.dumps(both(pipe, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
