"""Our kernel that chooses tokens, in the place of the graphs that do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from typing_extensions import override

from vlmforge.backends.choice import GREEDY
from vlmforge.backends.cuda.device import Device, Memory, Segment, Tensor, Work
from vlmforge.engine.chain import PartChain
from vlmforge.engine.interface import (
    BEST_IDS,
    BEST_LOGITS,
    CHOICES,
    CHOSEN,
    CHOSEN_LOGIT,
    EDIT_FACTORS,
    EDIT_IDS,
    EDIT_MINUS,
    LIKELIEST,
    LOGITS,
    NORMALISER,
)
from vlmforge_plugins.token_choice.launcher import Choosing, Kernels, launch_of, scratch_bytes


class ChoiceKernel(Segment):
    """The sampler's graph, or that of the likeliest tokens, as one launch.

    Of the sampler's outputs those behind the first are made where they are bound.

    Args:
        device: Runs it.
        kernels: What is launched.
        vocab_size: Logits of a row.
        rows: Of a batch whose logits are edited, at most; 0: of none they are.
    """

    def __init__(self, device: Device, kernels: Kernels, vocab_size: int, rows: int) -> None:
        self._device, self._kernels, self._vocab_size = device, kernels, vocab_size
        self._scratch = device.allocate(scratch_bytes(max(rows, 1), vocab_size))
        self._greedy = dict[int, Memory]()  # the choices of so many rows

    @override
    def bind(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Work:
        at = {tensor.name: tensor for tensor in (*inputs, *outputs)}

        def address(name: str) -> int:
            return at[name].address if name in at else 0

        rows = math.prod(at[LOGITS].shape[:-1])
        choosing = Choosing(
            logits=address(LOGITS),
            choices=address(CHOICES.name) or self._likeliest(rows).address,
            edit_ids=address(EDIT_IDS.name),
            edit_factors=address(EDIT_FACTORS.name),
            edit_minus=address(EDIT_MINUS.name),
            chosen=address(CHOSEN.name) or address(LIKELIEST.name),
            scratch=self._scratch.address,
            rows=rows,
            vocab=self._vocab_size,
            edits=at[EDIT_IDS.name].shape[1] if EDIT_IDS.name in at else 0,
            told=CHOSEN_LOGIT.name in at,
            chosen_logit=address(CHOSEN_LOGIT.name),
            normaliser=address(NORMALISER.name),
            best_ids=address(BEST_IDS),
            best_logits=address(BEST_LOGITS),
        )
        launch, params = launch_of(choosing, overlap=self._kernels.overlap)
        return partial(self._kernels.launch, launch, params, self._device.stream)

    def _likeliest(self, rows: int) -> Memory:
        if rows not in self._greedy:
            numbers = np.tile(np.array(GREEDY.numbers), (rows, 1))
            self._greedy[rows] = memory = self._device.allocate(numbers.nbytes)
            self._device.upload(memory.address, numbers)
        return self._greedy[rows]


def load_choice(device: Device, folder: Path, chain: PartChain, rows: int) -> ChoiceKernel | None:
    """Of an engine; None where its graphs are to be run."""
    sampler = chain.sampler
    if sampler is None or not chain.choosers:
        return None
    kernels = device.choosers({name: folder / file for name, file in chain.choosers.items()})
    if kernels is None:
        return None
    return ChoiceKernel(device, kernels, int(sampler.inputs[0].shape[-1]), rows)
