"""One side of the comparison: loads a model, then times a run for each line on standard input.

Each request is JSON `{"image": path, "question": str, "tokens": n}`; each answer is JSON with
seconds. A separate process for each side, so that peak memory is its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

Run = Callable[[str, str, int], dict[str, float]]


def ours(engine: str) -> Run:
    """vlmforge on an engine."""
    from vlmforge import EngineConfig, GenerationConfig, pipeline

    pipe = pipeline(engine, backend_config=EngineConfig(max_batch_size=1))

    def run(image: str, question: str, tokens: int) -> dict[str, float]:
        config = GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        response = pipe((question, Image.open(image)), gen_config=config)
        total = time.perf_counter() - begin
        times = response.timings
        return {
            "total": total,
            "tokens": response.generate_token_len,
            "prompt": response.input_token_len,
            "preprocess": times.load + times.preprocess,
            "encode": times.encode,
            "prefill": times.prefill,
        }

    return run


def transformers(checkpoint: str) -> Run:
    """Hugging Face `generate()` on the checkpoint, fp32, with its default attention."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    torch.set_num_threads(_cores())
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, use_fast=False)

    @torch.inference_mode()
    def run(image: str, question: str, tokens: int) -> dict[str, float]:
        begin = time.perf_counter()
        prompt = f"USER: <image>\n{question} ASSISTANT:"
        inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")
        prepared = time.perf_counter()
        output = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        end = time.perf_counter()
        # The tower alone, timed apart and not part of the total.
        model.get_image_features(pixel_values=inputs["pixel_values"])
        encode = time.perf_counter() - end
        length = inputs["input_ids"].shape[1]
        return {
            "total": end - begin,
            "tokens": output.shape[1] - length,
            "prompt": length,
            "preprocess": prepared - begin,
            "encode": encode,
            "prefill": end - prepared - encode if tokens == 1 else 0.0,
        }

    return run


def _cores() -> int:
    from vlmforge.limits import physical_cores

    return physical_cores()


def _peak_rss() -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Serve requests until the end of standard input."""
    side, model = sys.argv[1:]
    begin = time.perf_counter()
    run = {"ours": ours, "transformers": transformers}[side](model)
    print(json.dumps({"load": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = run(request["image"], request["question"], request["tokens"])
        print(json.dumps({**answer, "peak_rss": _peak_rss()}), flush=True)


if __name__ == "__main__":
    main()
