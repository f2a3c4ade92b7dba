"""Questions about scenes, and their exact answers.

Every question is a pure function of scenes and a random generator, and returns None where the
scenes have no such question (no single star to ask the colour of, say).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct, structs

from vlmforge.evaluation.scenes import COLORS, SHAPES, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four", "five")

NO_PICTURE = "I see no picture."


class Turn(Struct, frozen=True):
    """A question and its answer.

    Attributes:
        kind: What is asked, such as "color".
        question: Text of the user.
        answer: The exact answer.
        things: Things of the first scene that "it" may mean in the next turn.
        asked: "color", "place" or "size" where the next turn may ask "And the star?".
    """

    kind: str
    question: str
    answer: str
    things: tuple[Thing, ...] = ()
    asked: str = ""


Ask = Callable[[Scene, np.random.Generator], Turn | None]


def pick(rng: np.random.Generator, *options: str) -> str:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def spelled(rng: np.random.Generator, text: str) -> str:
    """British or American spelling."""
    return (
        text.replace("colour", "color").replace("centre", "center") if rng.random() < 0.5 else text
    )


def phrase(thing: Thing) -> str:
    """Its size, colour and shape."""
    return f"{thing.size} {thing.color} {thing.shape}"


def describe(scene: Scene, rng: np.random.Generator) -> Turn:
    """Everything, in reading order."""
    question = pick(
        rng,
        "Describe this picture.",
        "Describe the picture.",
        "Describe this image.",
        "What is in the picture?",
        "What is in this image?",
        "What do you see?",
        "What is shown in this picture?",
    )
    parts = [f"a {phrase(thing)} {thing.place}" for thing in scene.things]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return Turn("describe", question, text[0].upper() + text[1:] + ".", scene.things)


def color(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """The colour of the only thing of a shape."""
    thing = _only(scene, rng, "shape")
    if thing is None:
        return None
    question = pick(
        rng,
        f"What colour is the {thing.shape}?",
        f"What is the colour of the {thing.shape}?",
        f"Which colour does the {thing.shape} have?",
    )
    return _color_turn(thing, spelled(rng, question))


def shape(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """The shape of the only thing of a colour."""
    thing = _only(scene, rng, "color")
    if thing is None:
        return None
    noun = pick(rng, "thing", "object", "shape")
    question = pick(
        rng,
        f"What shape is the {thing.color} {noun}?",
        f"What is the {thing.color} {noun}?",
        f"Which shape is {thing.color}?",
    )
    return Turn("shape", question, f"The {thing.color} one is a {thing.shape}.", (thing,))


def size(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Small or large."""
    thing = _named(scene, rng)
    if thing is None:
        return None
    name = _name(scene, thing)
    question = pick(
        rng,
        f"Is the {name} large or small?",
        f"Is the {name} small or large?",
        f"How big is the {name}?",
        f"What size is the {name}?",
    )
    return Turn("size", question, f"The {name} is {thing.size}.", (thing,), "size")


def count(scene: Scene, rng: np.random.Generator) -> Turn:
    """How many of a shape, of a colour, or in all."""
    which = pick(rng, "all", "shape", "color", "both")
    form, colour = _asked_about(scene, rng, "shape"), _asked_about(scene, rng, "color")
    noun = pick(rng, "things", "objects", "shapes")
    if which == "all":
        matching, words, one = scene.things, noun, noun[:-1]
    elif which == "shape":
        matching = tuple(t for t in scene.things if t.shape == form)
        words, one = _plural(form), form
    elif which == "color":
        matching = tuple(t for t in scene.things if t.color == colour)
        words, one = f"{colour} {noun}", f"{colour} {noun[:-1]}"
    else:
        matching = tuple(t for t in scene.things if (t.shape, t.color) == (form, colour))
        words, one = f"{colour} {_plural(form)}", f"{colour} {form}"
    question = pick(rng, f"How many {words} are there?", f"How many {words} do you see?")
    number = NUMBERS[len(matching)]
    verb = "is" if len(matching) == 1 else "are"
    answer = f"There {verb} {number} {one if len(matching) == 1 else words}."
    return Turn("count", question, answer, matching if len(matching) == 1 else ())


def place(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Where a thing is."""
    thing = _named(scene, rng)
    if thing is None:
        return None
    name = _name(scene, thing)
    question = pick(
        rng,
        f"Where is the {name}?",
        f"In which part of the picture is the {name}?",
        f"Where do you see the {name}?",
    )
    return _place_turn(thing, name, question)


def at_place(scene: Scene, rng: np.random.Generator) -> Turn:
    """What is in a place."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    question = spelled(rng, f"What is {thing.place}?")
    return Turn("at_place", question, f"A {phrase(thing)}.", (thing,))


def yes_no(scene: Scene, rng: np.random.Generator) -> Turn:
    """Whether there is a thing of a colour and a shape; half of the answers are no."""
    pairs = {(t.color, t.shape) for t in scene.things}
    if rng.random() < 0.5:
        colour, form = sorted(pairs)[int(rng.integers(len(pairs)))]
    else:
        # Near misses: a colour and a shape that are in the picture, but not together.
        near = sorted({(t.color, s) for t in scene.things for s in SHAPES} - pairs)
        far = sorted({(c, s) for c in COLORS for s in SHAPES} - pairs)
        options = near if near and rng.random() < 0.7 else far
        colour, form = options[int(rng.integers(len(options)))]
    question = pick(
        rng,
        f"Is there a {colour} {form}?",
        f"Is there a {colour} {form} in the picture?",
        f"Do you see a {colour} {form}?",
    )
    if (colour, form) in pairs:
        things = tuple(t for t in scene.things if (t.color, t.shape) == (colour, form))
        known = things if len(things) == 1 else ()
        return Turn("yes_no", question, f"Yes, there is a {colour} {form}.", known)
    return Turn("yes_no", question, f"No, there is no {colour} {form}.")


def relation(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Whether one thing is left of, right of, above or below another."""
    named = [thing for thing in scene.things if _is_named(scene, thing)]
    if len(named) < 2:
        return None
    first, second = (named[i] for i in rng.choice(len(named), size=2, replace=False))
    across, down = first.column - second.column, first.row - second.row
    axes = [axis for axis, distance in (("x", across), ("y", down)) if distance]
    words = {"x": ("to the left of", "to the right of"), "y": ("above", "below")}
    axis = pick(rng, *axes)
    asked = int(rng.integers(2))
    true = asked == int((across if axis == "x" else down) > 0)
    a, b = _name(scene, first), _name(scene, second)
    said = f"{words[axis][asked]} the {b}"
    answer = f"Yes, it is {said}." if true else f"No, it is {words[axis][1 - asked]} the {b}."
    return Turn("relation", f"Is the {a} {said}?", answer, (first,))


def missing(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """A question about a shape that is not there."""
    absent = sorted(set(SHAPES) - {t.shape for t in scene.things})
    if not absent:
        return None
    form = pick(rng, *absent)
    question = pick(
        rng, f"What colour is the {form}?", f"Where is the {form}?", f"How big is the {form}?"
    )
    return Turn("missing", spelled(rng, question), f"I see no {form} in the picture.")


def follow_up(scene: Scene, before: Turn, rng: np.random.Generator) -> Turn | None:
    """A second turn that only the first one explains."""
    others = [
        thing for thing in scene.things if thing not in before.things and _is_named(scene, thing)
    ]
    if before.asked and others and rng.random() < 0.6:
        thing = others[int(rng.integers(len(others)))]
        turn = _and_the(scene, thing, before.asked, rng)
        if turn is not None:
            return turn
    if len(before.things) != 1:
        return None
    thing = before.things[0]
    options = [asked for asked in ("color", "place", "size") if asked != before.asked]
    if before.kind not in ("color", "place", "size", "shape"):
        options = [asked for asked in options if asked not in _told(before)]
    if not options:
        return None
    asked = pick(rng, *options)
    question, answer = {
        "color": ("What colour is it?", f"It is {thing.color}."),
        "place": ("Where is it?", f"It is {thing.place}."),
        "size": (pick(rng, "Is it large or small?", "How big is it?"), f"It is {thing.size}."),
    }[asked]
    return Turn("follow_up", spelled(rng, question), answer, before.things, asked)


def _and_the(scene: Scene, thing: Thing, asked: str, rng: np.random.Generator) -> Turn | None:
    name = thing.shape if asked == "color" else _name(scene, thing)
    if asked == "color" and not _unique(scene, thing, "shape"):
        return None
    answers = {"color": thing.color, "place": thing.place, "size": thing.size}
    question = pick(rng, f"And the {name}?", f"What about the {name}?")
    return Turn("follow_up", question, f"The {name} is {answers[asked]}.", (thing,), asked)


def _told(before: Turn) -> set[str]:
    """What the answer told already, so that asking it again would be odd."""
    told = {"color"} if before.kind in ("yes_no", "at_place") else set()
    return told | ({"size", "color"} if before.kind == "at_place" else set())


def compare(first: Scene, second: Scene, rng: np.random.Generator) -> Turn:
    """A question that needs two pictures."""
    order = [_compare_count, _compare_color, _compare_which]
    for index in rng.permutation(len(order)):
        turn = order[int(index)](first, second, rng)
        if turn is not None:
            return turn
    return _compare_count(first, second, rng)


def _compare_count(first: Scene, second: Scene, rng: np.random.Generator) -> Turn:
    noun = pick(rng, "things", "objects", "shapes")
    question = pick(rng, f"Which picture has more {noun}?", f"In which picture are more {noun}?")
    counts = len(first.things), len(second.things)
    if counts[0] == counts[1]:
        return Turn("compare", question, f"Both have {NUMBERS[counts[0]]}.")
    which = "first" if counts[0] > counts[1] else "second"
    return Turn("compare", question, f"The {which} picture.")


def _compare_color(first: Scene, second: Scene, rng: np.random.Generator) -> Turn | None:
    shapes = [
        thing.shape
        for thing in first.things
        if _unique(first, thing, "shape")
        and sum(t.shape == thing.shape for t in second.things) == 1
    ]
    if not shapes:
        return None
    form = pick(rng, *shapes)
    colors = [next(t.color for t in s.things if t.shape == form) for s in (first, second)]
    question = pick(
        rng,
        f"Is the {form} the same colour in both pictures?",
        f"Does the {form} have the same colour in both pictures?",
    )
    if colors[0] == colors[1]:
        return Turn("compare", spelled(rng, question), f"Yes, it is {colors[0]} in both.")
    answer = f"No, it is {colors[0]} in the first and {colors[1]} in the second."
    return Turn("compare", spelled(rng, question), answer)


def _compare_which(first: Scene, second: Scene, rng: np.random.Generator) -> Turn | None:
    key = pick(rng, "shape", "color")
    values = [{getattr(t, key) for t in scene.things} for scene in (first, second)]
    options = sorted(values[0] ^ values[1])
    if not options:
        return None
    value = pick(rng, *options)
    noun = value if key == "shape" else f"{value} {pick(rng, 'thing', 'object')}"
    question = pick(rng, f"Which picture has a {noun}?", f"In which picture is a {noun}?")
    return Turn("compare", question, f"The {'first' if value in values[0] else 'second'} picture.")


def _color_turn(thing: Thing, question: str) -> Turn:
    return Turn("color", question, f"The {thing.shape} is {thing.color}.", (thing,), "color")


def _place_turn(thing: Thing, name: str, question: str) -> Turn:
    return Turn("place", question, f"The {name} is {thing.place}.", (thing,), "place")


def _only(scene: Scene, rng: np.random.Generator, key: str) -> Thing | None:
    things = [thing for thing in scene.things if _unique(scene, thing, key)]
    return things[int(rng.integers(len(things)))] if things else None


def _unique(scene: Scene, thing: Thing, key: str) -> bool:
    return [getattr(t, key) for t in scene.things].count(getattr(thing, key)) == 1


def _is_named(scene: Scene, thing: Thing) -> bool:
    """Whether colour and shape tell it from all others."""
    same = [t for t in scene.things if (t.color, t.shape) == (thing.color, thing.shape)]
    return len(same) == 1


def _named(scene: Scene, rng: np.random.Generator) -> Thing | None:
    things = [thing for thing in scene.things if _is_named(scene, thing)]
    return things[int(rng.integers(len(things)))] if things else None


def _name(scene: Scene, thing: Thing) -> str:
    """The shortest name that is clear: its shape, or its colour and shape."""
    return thing.shape if _unique(scene, thing, "shape") else f"{thing.color} {thing.shape}"


def _asked_about(scene: Scene, rng: np.random.Generator, key: str) -> str:
    """A shape or colour, mostly one that is there."""
    there = [str(getattr(thing, key)) for thing in scene.things]
    every = COLORS if key == "color" else SHAPES
    return pick(rng, *(there if rng.random() < 0.8 else every))


def _plural(form: str) -> str:
    return f"{form}es" if form == "cross" else f"{form}s"


# With how often each is trained: what is hard to learn comes more often.
QUESTIONS: Sequence[tuple[Ask, float]] = (
    (describe, 1.0),
    (color, 1.0),
    (shape, 1.0),
    (size, 1.0),
    (count, 3.0),
    (place, 2.0),
    (at_place, 1.0),
    (yes_no, 1.5),
    (relation, 2.0),
    (missing, 0.7),
)


def any_question(scene: Scene, rng: np.random.Generator) -> Turn:
    """A question of a random kind that the scene has an answer to."""
    weights = np.array([weight for _, weight in QUESTIONS])
    while True:
        ask = QUESTIONS[int(rng.choice(len(QUESTIONS), p=weights / weights.sum()))][0]
        turn = ask(scene, rng)
        if turn is not None:
            return turn


def about_picture(turn: Turn, index: int) -> Turn:
    """The same question, of the first (0) or second (1) of two pictures."""
    asked = turn.question[0].lower() + turn.question[1:]
    question = f"In the {('first', 'second')[index]} picture, {asked}"
    return structs.replace(turn, question=question.replace(" in the picture", ""))


def about(turn: Turn, kind: str) -> Turn:
    """The same turn counted as another kind."""
    return structs.replace(turn, kind=kind)
