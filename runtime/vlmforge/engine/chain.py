"""A part that is a chain: segments that a library runs, and between them what we launch ourselves.

Plain data of the manifest. Tensors are told by their names: what one step gives, later ones take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a part. A string in `shape` is a symbolic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A graph of its own, a file.

    Attributes:
        file: Where it is.
        inputs, outputs: Its tensors; of the part's own inputs and outputs, or of other steps.
        token_bytes: Bytes that what it calculates in between takes for each token of a step, at
            most; an estimate, by which memory is planned.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    token_bytes: int


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A launch of our paged attention over the pools of one layer.

    Attributes:
        layer: Whose pools of pages it reads and writes.
        qkv: Tensor `[batch, tokens, (heads + 2 * kv_heads) * head_dim]`: query, key and value of a
            token one after the other.
        out: Tensor `[batch, tokens, heads * head_dim]`.
        heads, kv_heads, head_dim: Of queries, of keys and values, and the size of each.
        scale: Factor on the scores.
        key_scale, value_scale: What one unit of an fp8 pool is worth; 1 for other pools.
        rotary: Whether it rotates query and key by the chain's tables.
    """

    layer: int
    qkv: str
    out: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    key_scale: float
    value_scale: float
    rotary: bool


@dataclass(frozen=True, slots=True)
class ChainStep:
    """Exactly one of them."""

    segment: Segment | None = None
    attention: AttentionCall | None = None


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """Cosines and sines, float32 `[positions, width]` each, at their offsets in bytes in `file`."""

    file: str
    cos_offset: int
    sin_offset: int
    positions: int
    width: int


@dataclass(frozen=True, slots=True)
class PartChain:
    """What is run, in order.

    Attributes:
        steps: The first and the last are segments.
        rotary: What the attention rotates by; None where none does.
        kernels: Files of the attention's compiled kernels, by the names of their targets.
    """

    steps: tuple[ChainStep, ...]
    rotary: RotaryTables | None
    kernels: Mapping[str, str]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All of them, in order."""
        return tuple(step.segment for step in self.steps if step.segment is not None)

    @property
    def attention(self) -> tuple[AttentionCall, ...]:
        """All launches of attention, in order."""
        return tuple(step.attention for step in self.steps if step.attention is not None)

    @property
    def files(self) -> frozenset[str]:
        """All that it names."""
        tables = () if self.rotary is None else (self.rotary.file,)
        return frozenset((*(s.file for s in self.segments), *self.kernels.values(), *tables))
