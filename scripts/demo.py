"""The demo: build an engine from the trained demo model and ask it about two pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vlmforge import Pipeline, pipeline
from vlmforge.evaluation.draw import draw
from vlmforge.evaluation.scenes import Scene, Thing
from vlmforge_recipes.llava.demo import CHECKPOINT

# Combinations of shapes and colours that the model was not trained on.
SCENES = (
    Scene((Thing(0, "large", "purple", "star"), Thing(5, "small", "yellow", "circle"))),
    Scene(
        (
            Thing(1, "small", "yellow", "circle"),
            Thing(3, "large", "blue", "square"),
            Thing(8, "small", "white", "circle"),
        )
    ),
)
SEEDS = (3, 7)


def main(work: Path) -> int:
    """Run the demo below `work`; 1 when the build fails or an answer is wrong."""
    engine = work / "engine"
    work.mkdir(parents=True, exist_ok=True)
    paths = (work / "first.png", work / "second.png")
    for path, picture in zip(paths, pictures(), strict=True):
        picture.save(path)
    print(f"Drew {paths[0]} and {paths[1]}: {', '.join(map(str, SCENES))}\n")

    builder = Path(sys.executable).with_name("build-engine")
    shown = os.path.relpath(CHECKPOINT)
    print(f"$ build-engine {shown} -o {engine}", flush=True)
    if subprocess.run([builder, CHECKPOINT, "-o", engine, "--force"], check=False).returncode:
        return 1

    print(f"\n>>> first, second = {str(paths[0])!r}, {str(paths[1])!r}")
    print(f">>> pipe = pipeline({str(engine)!r})")
    with pipeline(str(engine)) as pipe:
        wrong = ask(pipe, str(paths[0]), str(paths[1]))
    print(f"\nTalk to it: vlmforge chat {engine}    Measure it: vlmforge eval {engine}")
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


def pictures() -> tuple[Image.Image, ...]:
    """The two pictures, the same on every machine."""
    return tuple(
        draw(scene, np.random.default_rng(seed)) for scene, seed in zip(SCENES, SEEDS, strict=True)
    )


def ask(pipe: Pipeline, first: str, second: str) -> list[str]:
    """Ask in every form, print the answers, and return those that are not the true ones."""
    said: list[tuple[str, str]] = []

    print(">>> pipe(('Describe this picture.', first)).text                    # a tuple")
    said.append(
        (
            show(pipe(("Describe this picture.", first)).text),
            "A large purple star at the top left and a small yellow circle on the right.",
        )
    )

    print(">>> pipe([{'role': 'user', 'content': [                             # OpenAI messages")
    print("...     {'type': 'image_url', 'image_url': {'url': second}},")
    print("...     {'type': 'text', 'text': 'How many circles are there?'}]}]).text")
    message = {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": second}},
            {"type": "text", "text": "How many circles are there?"},
        ],
    }
    said.append((show(pipe([message]).text), "There are two circles."))

    print(">>> [reply.text for reply in pipe([                                 # a batch")
    print("...     ('Where is the square?', second), ('Is there a blue star?', first),")
    print("...     ('Which picture has more things?', [first, second]), 'Who are you?'])]")
    batch = [
        ("Where is the square?", second),
        ("Is there a blue star?", first),
        ("Which picture has more things?", [first, second]),
        "Who are you?",
    ]
    answers = (
        "The square is on the left.",
        "No, there is no blue star.",
        "The second picture.",
        "I am the demo model of vlmforge.",
    )
    said += zip((show(reply.text) for reply in pipe(batch)), answers, strict=True)

    print(">>> session = pipe.chat(('What colour is the star?', first))        # a conversation")
    session = pipe.chat(("What colour is the star?", first))
    said.append((show(session.response.text), "The star is purple."))
    print(">>> pipe.chat('And the circle?', session=session).response.text")
    session = pipe.chat("And the circle?", session=session)
    said.append((show(session.response.text), "The circle is yellow."))
    return [f"{reply!r} instead of {truth!r}" for reply, truth in said if reply != truth]


def show(text: str) -> str:
    """Print an answer as Python would, and return it."""
    print(repr(text.strip()))
    return text.strip()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
