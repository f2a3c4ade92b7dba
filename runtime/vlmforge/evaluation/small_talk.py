"""Questions that no picture answers: about the model itself, and those it must refuse."""

from __future__ import annotations

import zlib

import numpy as np

from vlmforge.evaluation.questions import NO_PICTURE, Turn, pick
from vlmforge.evaluation.scenes import SHAPES

REFUSAL = "I cannot answer that. I only know drawn shapes."
NAME = "I am the demo model of vlmforge."
ABILITY = "I tell the shapes, colours, sizes and places of things in drawn pictures."
MAKER = "The vlmforge project trained me on pictures that it draws."

_SELF: tuple[tuple[str, tuple[str, ...]], ...] = (
    (NAME, ("Who are you?", "What are you?", "What is your name?", "Hello!", "Hi!", "Hello")),
    (
        ABILITY,
        ("What can you do?", "What do you know?", "How can you help me?", "What can I ask you?"),
    ),
    (MAKER, ("Who made you?", "Who trained you?", "Where do you come from?", "How were you made?")),
)
_NOUNS = (
    "cat",
    "dog",
    "house",
    "car",
    "tree",
    "bird",
    "boat",
    "train",
    "city",
    "river",
    "king",
    "queen",
    "teacher",
    "doctor",
    "train",
    "table",
    "chair",
    "book",
    "song",
    "film",
    "game",
    "phone",
    "computer",
    "world",
    "moon",
    "sun",
    "weather",
    "money",
    "bread",
    "water",
    "coffee",
    "mountain",
    "garden",
    "flower",
    "window",
    "door",
    "school",
    "team",
    "country",
    "language",
)
_FRAMES = (
    "How old is the {}?",
    "What is the name of the {}?",
    "Who owns the {}?",
    "How much does the {} cost?",
    "What does the {} do?",
    "Why is the {} here?",
    "When was the {} made?",
    "What is the capital of the {}?",
    "Can you write a poem about the {}?",
    "Tell me a story about a {}.",
    "What will the {} be tomorrow?",
    "How do I repair a {}?",
    "Who is the {}?",
    "Is the {} happy?",
    "What colour is the {}?",
    "Where is the {}?",
)
_TEST_SHARE = 5


def about_itself(rng: np.random.Generator) -> Turn:
    """A question about the model."""
    answer, questions = _SELF[int(rng.integers(len(_SELF)))]
    return Turn("itself", pick(rng, *questions), answer)


def unanswerable(rng: np.random.Generator, *, held_out: bool) -> Turn:
    """A question that no drawn picture answers; held-out ones are new pairs of frame and noun."""
    while True:
        question = pick(rng, *_FRAMES).format(pick(rng, *_NOUNS))
        if (zlib.crc32(question.encode()) % _TEST_SHARE == 0) == held_out:
            return Turn("refusal", question, REFUSAL)


def without_picture(rng: np.random.Generator) -> Turn:
    """A question about a picture that was not given."""
    form = pick(rng, *SHAPES)
    question = pick(
        rng,
        f"What colour is the {form}?",
        f"Where is the {form}?",
        f"How many {form}s are there?",
        f"Is there a red {form}?",
        "Describe this picture.",
        "What do you see?",
    )
    return Turn("no_picture", question, NO_PICTURE)
