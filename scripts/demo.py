"""The demo: make a tiny checkpoint, build an engine from it, ask it about a photograph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image

from vlmforge import GenerationConfig, pipeline
from vlmforge_recipes.llava.synthetic import PRESETS, write_checkpoint

QUESTION = "What is shown in this picture?"


def main(work: Path) -> None:
    """Run the demo below `work`."""
    checkpoint, engine, photo = work / "checkpoint", work / "engine", work / "china.png"
    work.mkdir(parents=True, exist_ok=True)
    print("No trained model is at hand, so this makes a tiny one with RANDOM weights:")
    print("what it answers is noise, but every step is the real one.\n")
    if not checkpoint.exists():
        write_checkpoint(checkpoint, PRESETS["tiny"])
    Image.fromarray(load_sample_image("china.jpg")).save(photo)

    builder = Path(sys.executable).with_name("build-engine")
    print(f"$ build-engine {checkpoint} -o {engine}", flush=True)
    subprocess.run([builder, checkpoint, "-o", engine, "--force"], check=True)

    print(f"\n>>> pipe = pipeline({str(engine)!r})")
    with pipeline(str(engine)) as pipe:
        print(f">>> print(pipe(({QUESTION!r}, {str(photo)!r})))")
        print(pipe((QUESTION, str(photo)), gen_config=GenerationConfig(max_new_tokens=24)))
    print(f"\nTalk to it: vlmforge chat {engine}    Look inside: vlmforge inspect {engine}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
