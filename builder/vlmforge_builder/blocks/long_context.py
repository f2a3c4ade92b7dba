"""Rotary positions of a decoder that is used beyond the length it was trained for.

Dynamic NTK: the longer the prompt, the more slowly the angles turn. How slowly is decided once for
a sequence, when its whole prompt is known, and kept while it grows; so it is a number that comes
with each sequence, the level, and every level has a table of its own. Queries far from the start
can be scaled by the logarithm of their position besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlmforge.engine.positions.dynamic_ntk import level_of


@dataclass(frozen=True, slots=True)
class LongContext:
    """How positions behave beyond `trained_length` tokens.

    Attributes:
        trained_length: Tokens of the longest sequence in training.
        dynamic_ntk: Slow the angles down by levels; False: one level, whose angles are plain.
        log_scaled: Multiply the query at 1-based position i > trained_length by
            `log(i) / log(trained_length)`.
    """

    trained_length: int
    dynamic_ntk: bool
    log_scaled: bool

    def levels(self, max_positions: int) -> int:
        """How many levels prompts of up to `max_positions` tokens have."""
        return 1 + level_of(max_positions, self.trained_length) if self.dynamic_ntk else 1


class Rotation(NamedTuple):
    """Cosines and sines `[B, S, head_dim / 2]` of the tokens of a step."""

    query_cos: Tensor
    query_sin: Tensor
    key_cos: Tensor
    key_sin: Tensor


def level_tables(theta: float, head_dim: int, positions: int, levels: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[levels * positions, head_dim / 2]`, fp32, one level after the other.

    Level n turns by `theta * (2 ** (n + 1) - 1) ** (head_dim / (head_dim - 2))`, each step in the
    precision in which the original implementation takes it.
    """
    exponent = torch.arange(0, head_dim, 2).float() / head_dim
    angles = []
    for level in range(levels):
        alpha = 2 ** (level + 1) - 1
        base = theta * alpha ** (head_dim / (head_dim - 2))
        frequencies = 1.0 / (base**exponent)
        angles.append(torch.outer(torch.arange(positions).float(), frequencies))
    table = torch.cat(angles)
    return table.cos(), table.sin()


def log_scales(trained_length: int, positions: int) -> Tensor:
    """Factors `[positions]` of queries, fp32: 1 up to `trained_length`."""
    numbers = range(1, positions + 1)
    return torch.tensor(
        [math.log(i, trained_length) if i > trained_length else 1.0 for i in numbers]
    )


class LevelPositions(nn.Module):
    """The tables, and the rows of them that the tokens of a step need."""

    def __init__(self, context: LongContext, positions: int, head_dim: int) -> None:
        super().__init__()
        self.rows = positions
        size = (context.levels(positions) * positions, head_dim // 2)
        self.cos = nn.Parameter(torch.empty(size))
        self.sin = nn.Parameter(torch.empty(size))
        self.scale = nn.Parameter(torch.empty(positions)) if context.log_scaled else None

    def forward(self, past_lengths: Tensor, levels: Tensor, tokens: Tensor) -> Rotation:
        """Rows for `tokens` `[B, S]` behind `past_lengths` `[B]` others, at `levels` `[B]`."""
        steps = torch.arange(tokens.shape[1])
        positions = past_lengths.unsqueeze(1) + steps.unsqueeze(0)
        rows = positions + (levels * self.rows).unsqueeze(1)
        cos, sin = self.cos[rows], self.sin[rows]
        if self.scale is None:
            return Rotation(cos, sin, cos, sin)
        # A scaled rotation is the rotation of a scaled query.
        scale = self.scale[positions].unsqueeze(-1)
        return Rotation(cos * scale, sin * scale, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x [B, S, heads * D]` by `cos`, `sin` `[B, S, D / 2]` (rotate-half convention).

    One op: compilers know it, and one of them dies of the slices and products that it stands for.
    """
    heads = x.shape[-1] // (2 * cos.shape[-1])
    return torch.onnx.ops.rotary_embedding(x, cos, sin, num_heads=heads)
