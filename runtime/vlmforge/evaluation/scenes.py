"""Scenes: coloured shapes in the nine places of a picture; some combinations are held out."""

from __future__ import annotations

import zlib

import numpy as np
from msgspec import Struct

COLORS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the centre",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
MAX_THINGS = 5
# One combination in so many is never trained on.
_HELD_OUT_OF = 5


class Thing(Struct, frozen=True, order=True):
    """A shape in place `cell` (0 to 8, by rows; an index into `PLACES`)."""

    cell: int
    size: str
    color: str
    shape: str

    @property
    def row(self) -> int:
        """0 at the top."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """0 on the left."""
        return self.cell % 3

    @property
    def place(self) -> str:
        """The place in words."""
        return PLACES[self.cell]


class Scene(Struct, frozen=True):
    """One to five things, in reading order, at most one in a place."""

    things: tuple[Thing, ...]

    @property
    def held_out(self) -> bool:
        """Whether the combination of colours and shapes belongs to the held-out ones.

        It depends on nothing but the combination, so that training and test scenes are disjoint
        in their combinations, wherever the things are and however they are drawn.
        """
        words = sorted(f"{thing.color} {thing.shape}" for thing in self.things)
        return zlib.crc32(" + ".join(words).encode()) % _HELD_OUT_OF == 0


def random_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """A scene of the training or of the held-out combinations."""
    while True:
        scene = _any_scene(rng)
        if scene.held_out == held_out:
            return scene


def _any_scene(rng: np.random.Generator) -> Scene:
    count = int(rng.integers(1, MAX_THINGS + 1))
    cells = rng.choice(9, size=count, replace=False)
    # Fewer kinds make repeated shapes and colours common, which counting needs.
    shapes = rng.choice(SHAPES, size=int(rng.integers(1, len(SHAPES) + 1)), replace=False)
    colors = rng.choice(COLORS, size=int(rng.integers(1, len(COLORS) + 1)), replace=False)
    things = [
        Thing(int(cell), str(rng.choice(SIZES)), str(rng.choice(colors)), str(rng.choice(shapes)))
        for cell in cells
    ]
    return Scene(tuple(sorted(things)))
