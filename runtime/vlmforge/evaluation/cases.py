"""Conversations about pictures: what the model is trained on, and what an engine is asked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from msgspec import Struct, structs
from PIL import Image

from vlmforge.evaluation import small_talk
from vlmforge.evaluation.draw import draw
from vlmforge.evaluation.questions import (
    Turn,
    about,
    about_picture,
    any_question,
    color,
    compare,
    count,
    describe,
    follow_up,
    place,
    relation,
    shape,
    size,
    yes_no,
)
from vlmforge.evaluation.scenes import Scene, random_scene


class Case(Struct, frozen=True):
    """A conversation about pictures, all of which are shown in the first turn.

    The last turn is the one that is scored.
    """

    pictures: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]

    @property
    def kind(self) -> str:
        """Kind of the scored turn."""
        return self.turns[-1].kind


# Kinds that one picture and one turn make.
_SINGLE = {
    "describe": describe,
    "color": color,
    "shape": shape,
    "size": size,
    "count": count,
    "place": place,
    "yes_no": yes_no,
    "relation": relation,
}
KINDS = (*_SINGLE, "compare", "second_turn", "itself", "refusal", "no_picture")


def held_out_cases(limit: int, *, seed: int = 0) -> Iterator[Case]:
    """`limit` cases on held-out scenes, the kinds in turn; the same for the same seed."""
    for index in range(limit):
        rng = np.random.default_rng([seed, 1, index])
        yield _case(KINDS[index % len(KINDS)], rng)


def _case(kind: str, rng: np.random.Generator) -> Case:
    if kind == "itself":
        return Case((), (small_talk.about_itself(rng),))
    if kind == "no_picture":
        return Case((), (small_talk.without_picture(rng),))
    scene = random_scene(rng, held_out=True)
    if kind == "refusal":
        turn = small_talk.unanswerable(rng, held_out=True)
        return Case((draw(scene, rng),) if rng.random() < 0.5 else (), (turn,))
    if kind == "compare":
        other = random_scene(rng, held_out=True)
        turn = compare(scene, other, rng)
        return Case((draw(scene, rng), draw(other, rng)), (turn,))
    turns = _second_turn(scene, rng) if kind == "second_turn" else _first_turn(kind, scene, rng)
    return Case((draw(scene, rng),), turns) if turns else _case(kind, rng)


def _first_turn(kind: str, scene: Scene, rng: np.random.Generator) -> tuple[Turn, ...]:
    turn = _SINGLE[kind](scene, rng)
    return () if turn is None else (turn,)


def _second_turn(scene: Scene, rng: np.random.Generator) -> tuple[Turn, ...]:
    first = (color, place, size, shape, yes_no)[int(rng.integers(5))](scene, rng)
    second = None if first is None else follow_up(scene, first, rng)
    if first is None or second is None:
        return ()
    return first, about(second, "second_turn")


def training_conversation(
    rng: np.random.Generator, *, turns: int
) -> tuple[tuple[Scene, ...], tuple[Turn, ...]]:
    """Scenes of the training combinations, and `turns` turns about them."""
    scenes, asked = _training_turns(rng, turns)
    return scenes, tuple(_typed(turn, rng) for turn in asked)


def _training_turns(
    rng: np.random.Generator, turns: int
) -> tuple[tuple[Scene, ...], tuple[Turn, ...]]:
    chance = rng.random()
    if chance < 0.04:
        return (), tuple(_talk(rng, pictures=0) for _ in range(min(turns, 3)))
    scene = random_scene(rng, held_out=False)
    if chance < 0.24:
        other = random_scene(rng, held_out=False)
        return (scene, other), tuple(_about_two(scene, other, rng) for _ in range(turns))
    return (scene,), _conversation(scene, rng, turns)


def _typed(turn: Turn, rng: np.random.Generator) -> Turn:
    """The question as people type it: some leave out the capital or the question mark."""
    question = turn.question
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return structs.replace(turn, question=question)


def _about_two(first: Scene, second: Scene, rng: np.random.Generator) -> Turn:
    """A comparison, or a question about one of two pictures."""
    if rng.random() < 0.6:
        return compare(first, second, rng)
    which = int(rng.integers(2))
    return about_picture(any_question((first, second)[which], rng), which)


def _conversation(scene: Scene, rng: np.random.Generator, turns: int) -> tuple[Turn, ...]:
    found: list[Turn] = []
    while len(found) < turns:
        turn: Turn | None = None
        if found and rng.random() < 0.4:
            turn = follow_up(scene, found[-1], rng)
        elif rng.random() < 0.04:
            turn = _talk(rng, pictures=1)
        found.append(any_question(scene, rng) if turn is None else turn)
    return tuple(found)


def _talk(rng: np.random.Generator, *, pictures: int) -> Turn:
    chance = rng.random()
    if chance < 0.35:
        return small_talk.about_itself(rng)
    if chance < 0.65 and not pictures:
        return small_talk.without_picture(rng)
    return small_talk.unanswerable(rng, held_out=False)
