"""Scenes, pictures and questions: answers are true, splits are disjoint, seeds are honoured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from vlmforge.evaluation import questions, small_talk
from vlmforge.evaluation.cases import KINDS, held_out_cases, training_conversation
from vlmforge.evaluation.draw import draw
from vlmforge.evaluation.scenes import PLACES, Scene, Thing, random_scene

SEEDS = st.integers(0, 2**32 - 1)
RED_STAR = Thing(0, "large", "red", "star")
BLUE_STAR = Thing(4, "small", "blue", "star")
GREEN_CROSS = Thing(8, "small", "green", "cross")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def combination(scene: Scene) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((thing.color, thing.shape) for thing in scene.things))


def test_the_combinations_of_training_and_test_scenes_are_disjoint() -> None:
    generator = rng()
    trained = {combination(random_scene(generator, held_out=False)) for _ in range(1500)}
    held = {combination(random_scene(generator, held_out=True)) for _ in range(700)}
    assert not trained & held
    assert len(held) > 300
    # One thing alone is where a split by places or sizes would leak.
    assert any(len(c) == 1 for c in held)
    assert any(len(c) == 1 for c in trained)


@given(SEEDS)
@settings(max_examples=examples(200))
def test_training_shows_no_held_out_scene(seed: int) -> None:
    scenes, turns = training_conversation(rng(seed), turns=5)
    assert not any(scene.held_out for scene in scenes)
    assert turns


@given(SEEDS, st.booleans())
@settings(max_examples=examples(200))
def test_things_stand_apart_and_in_reading_order(seed: int, held_out: bool) -> None:
    cells = [thing.cell for thing in random_scene(rng(seed), held_out=held_out).things]
    assert cells == sorted(set(cells))
    assert 1 <= len(cells) <= 5


def test_the_same_seed_gives_the_same_cases_and_another_one_others() -> None:
    first, again, other = (list(held_out_cases(26, seed=seed)) for seed in (1, 1, 2))
    for one, two in zip(first, again, strict=True):
        assert one.turns == two.turns
        pixels = zip(one.pictures, two.pictures, strict=True)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pixels)
    assert [case.turns for case in first] != [case.turns for case in other]
    assert [case.kind for case in first] == [*KINDS, *KINDS]


@given(SEEDS)
@settings(max_examples=60)
def test_a_picture_shows_each_thing_in_its_place(seed: int) -> None:
    """A part of its place has its colour: checked by hue, not by how it was drawn."""
    generator = rng(seed)
    scene = random_scene(generator, held_out=False)
    pixels = np.asarray(draw(scene, generator)).astype(float)
    height, width = pixels.shape[:2]
    for thing in scene.things:
        rows = slice(thing.row * height // 3, (thing.row + 1) * height // 3)
        columns = slice(thing.column * width // 3, (thing.column + 1) * width // 3)
        red, green, blue = pixels[rows, columns].reshape(-1, 3).T
        share = {
            "red": (red > green + 60) & (red > blue + 60),
            "green": (green > red + 40) & (green > blue + 30),
            "blue": (blue > red + 60) & (blue > green + 40),
            "yellow": np.minimum(red, green) > blue + 70,
            "purple": np.minimum(red, blue) > green + 40,
            "white": np.minimum(np.minimum(red, green), blue) > 190,
        }[thing.color].mean()
        # A small star covers 5 % of it or more; a photograph behind reaches 4 % at times.
        assert share > 0.045, (thing, share)


@given(SEEDS)
@settings(max_examples=examples(300))
def test_answers_are_true(seed: int) -> None:
    """Every kind of question against a reading of the scene that shares no code with it."""
    generator = rng(seed)
    scene = random_scene(generator, held_out=False)
    things = scene.things
    if turn := questions.color(scene, generator):
        _, form, _, colour = turn.answer.rstrip(".").split()
        assert [t.color for t in things if t.shape == form] == [colour]
    if turn := questions.shape(scene, generator):
        words = turn.answer.rstrip(".").split()
        assert [t.shape for t in things if t.color == words[1]] == [words[-1]]
    if turn := questions.place(scene, generator):
        name, _, where = turn.answer.removeprefix("The ").rstrip(".").partition(" is ")
        found = [t for t in things if f"{t.color} {t.shape}".endswith(name)]
        assert [PLACES[t.cell] for t in found] == [where]
    turn = questions.describe(scene, generator)
    assert all(f"a {t.size} {t.color} {t.shape} {t.place}" in turn.answer.lower() for t in things)
    turn = questions.yes_no(scene, generator)
    there = any(f"a {t.color} {t.shape}" in turn.question for t in things)
    assert turn.answer.startswith("Yes" if there else "No")


@pytest.mark.parametrize(
    ("things", "question", "answer"),
    [
        ((RED_STAR, BLUE_STAR), "How many stars are there?", "There are two stars."),
        ((RED_STAR, BLUE_STAR), "How many blue stars are there?", "There is one blue star."),
        ((RED_STAR, GREEN_CROSS), "How many crosses are there?", "There is one cross."),
        ((RED_STAR,), "How many crosses are there?", "There are no crosses."),
        ((RED_STAR, GREEN_CROSS), "How many things are there?", "There are two things."),
        ((GREEN_CROSS,), "How many green shapes are there?", "There is one green shape."),
    ],
)
def test_counts(things: tuple[Thing, ...], question: str, answer: str) -> None:
    turns = [questions.count(Scene(things), rng(seed)) for seed in range(600)]
    assert {turn.answer for turn in turns if turn.question == question} == {answer}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Is the red star above the blue star?", "Yes, it is above the blue star."),
        ("Is the red star below the blue star?", "No, it is above the blue star."),
        ("Is the cross to the left of the red star?", "No, it is to the right of the red star."),
        ("Is the blue star to the left of the cross?", "Yes, it is to the left of the cross."),
    ],
)
def test_relations(question: str, answer: str) -> None:
    scene = Scene((RED_STAR, BLUE_STAR, GREEN_CROSS))
    turns = [questions.relation(scene, rng(seed)) for seed in range(600)]
    assert {turn.answer for turn in turns if turn and turn.question == question} == {answer}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which picture has a cross?", "The second picture."),
        ("Which picture has a blue thing?", "The first picture."),
        ("Which picture has more things?", "The first picture."),
    ],
)
def test_comparisons(question: str, answer: str) -> None:
    first, second = Scene((RED_STAR, BLUE_STAR)), Scene((GREEN_CROSS,))
    turns = [questions.compare(first, second, rng(seed)) for seed in range(600)]
    assert {turn.answer for turn in turns if turn.question == question} == {answer}


def test_colours_of_a_shape_in_two_pictures() -> None:
    first, second = Scene((RED_STAR,)), Scene((BLUE_STAR,))
    turns = [questions.compare(first, second, rng(seed)) for seed in range(300)]
    answers = {turn.answer for turn in turns if "both pictures" in turn.question}
    assert answers == {"No, it is red in the first and blue in the second."}
    assert "Both have one." in {turn.answer for turn in turns}


@given(SEEDS)
@settings(max_examples=examples(200))
def test_a_follow_up_cannot_be_answered_alone(seed: int) -> None:
    generator = rng(seed)
    scene = random_scene(generator, held_out=False)
    first = questions.place(scene, generator)
    second = first and questions.follow_up(scene, first, generator)
    if first is None or second is None:
        return
    assert " it" in second.question or second.question.startswith(("And the", "What about"))
    if second.question.startswith(("And", "What about")):
        assert any(second.answer.endswith(f" is {place}.") for place in PLACES)
    else:
        assert second.things == first.things


def test_held_out_refusals_are_other_questions_than_trained_ones() -> None:
    generator = rng()
    trained = {small_talk.unanswerable(generator, held_out=False).question for _ in range(3000)}
    held = {small_talk.unanswerable(generator, held_out=True).question for _ in range(500)}
    assert not trained & held
    assert len(held) > 50
