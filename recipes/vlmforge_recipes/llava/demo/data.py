"""Batches of training conversations, drawn as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmforge.evaluation.cases import training_conversation
from vlmforge.evaluation.draw import draw
from vlmforge.evaluation.scenes import COLORS, SHAPES, SIZES, Scene
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.vl.preprocess import preprocess
from vlmforge_recipes.llava.demo.spec import IMAGE_POLICY, Training
from vlmforge_recipes.llava.demo.text import conversation_ids
from vlmforge_recipes.llava.synthetic.spec import VisionSpec

# Colour, shape and size of what a patch shows, with nothing first; and whether it is the middle of
# a thing, of which there is one for each thing to count.
PATCH_CLASSES = (len(COLORS) + 1, len(SHAPES) + 1, len(SIZES) + 1, 2)
# Share of a place, from its middle, in which a patch is said to show the thing there.
_CORE = 0.36
# Few conversations are longer; what comes after is not trained on.
_MAX_TOKENS = 240


@dataclass(frozen=True, slots=True)
class Batch:
    """Some conversations.

    Attributes:
        pixel_values: float32 `[n, 3, H, W]`, all pictures in order.
        ids: int64 `[b, t]`, padded on the right.
        rows: int64 `[b, t]`, the row of the pictures' features at each position, or -1 for text.
        labels: int64 `[b, t]`, the next token where it is part of an answer, else -100.
        patches: int64 `[n, patches, 4]`, a class of each of `PATCH_CLASSES` for each patch.
    """

    pixel_values: Tensor
    ids: Tensor
    rows: Tensor
    labels: Tensor
    patches: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved = (self.pixel_values, self.ids, self.rows, self.labels, self.patches)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in moved))


class Conversations(Dataset[Batch]):
    """Batch `i` depends on the seed and on `i` alone."""

    def __init__(self, training: Training, vision: VisionSpec, tokenizer_json: str) -> None:
        self._training, self._vision = training, vision
        self._tokenizer_json = tokenizer_json
        self._tokenizer: TextTokenizer | None = None

    def __len__(self) -> int:
        return self._training.steps

    def __getitem__(self, index: int) -> Batch:
        if self._tokenizer is None:  # one for each worker process
            self._tokenizer = TextTokenizer(self._tokenizer_json)
        side = self._vision.image_size // self._vision.patch_size
        patches = side * side
        pixels, seen, texts, count = [], [], [], 0
        for item in range(self._training.batch_size):
            rng = np.random.default_rng([self._training.seed, 0, index, item])
            scenes, turns = training_conversation(rng, turns=self._training.turns)
            pictures = [draw(scene, rng) for scene in scenes]
            pixels += [preprocess(picture, IMAGE_POLICY) for picture in pictures]
            seen += [
                patch_classes(scene, picture.size, side)
                for scene, picture in zip(scenes, pictures, strict=True)
            ]
            ids, image, labels = conversation_ids(
                self._tokenizer, turns, pictures=len(pictures), rows=patches
            )
            image = [row + count * patches if row >= 0 else row for row in image]
            count += len(pictures)
            texts.append((ids, image, labels))
        return Batch(
            torch.from_numpy(np.concatenate(pixels)),
            _padded([ids for ids, _, _ in texts], 0),
            _padded([image for _, image, _ in texts], -1),
            _padded([labels for _, _, labels in texts], -100),
            torch.stack(seen),
        )


def patch_classes(scene: Scene, size: tuple[int, int], side: int) -> Tensor:
    """Classes of each patch, int64 `[side * side, 4]`: see `PATCH_CLASSES`.

    `size` is the picture's width and height; it is shown in the middle of a square.
    """
    across, down = (_offsets(length, max(size), side) for length in size)
    found = torch.zeros(side, side, len(PATCH_CLASSES), dtype=torch.int64)
    for thing in scene.things:
        x, y = np.abs(across - thing.column), np.abs(down - thing.row)
        label = (
            COLORS.index(thing.color) + 1,
            SHAPES.index(thing.shape) + 1,
            SIZES.index(thing.size) + 1,
            0,
        )
        found[torch.from_numpy(np.outer(y <= _CORE, x <= _CORE))] = torch.tensor(label)
        found[int(y.argmin()), int(x.argmin()), 3] = 1
    return found.flatten(0, 1)


def _offsets(length: int, square: int, side: int) -> NDArray[np.float64]:
    """Where the middles of `side` patches are in a picture of `length` pixels, centred on a square.

    0, 1 and 2 are the middles of the three places.
    """
    middles = (np.arange(side) + 0.5) * square / side
    return (middles - (square - length) // 2) * 3 / length - 0.5


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = min(max(len(row) for row in rows), _MAX_TOKENS)
    return torch.tensor([row[:width] + [value] * (width - len(row)) for row in rows])


def batches(conversations: Conversations, workers: int) -> Iterator[Batch]:
    """All batches in order, made by `workers` processes ahead of time."""
    return iter(
        DataLoader(
            conversations,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
    )
