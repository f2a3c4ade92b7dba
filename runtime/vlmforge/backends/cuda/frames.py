"""How a step lies in the device's memory: sizes, offsets and buckets. Pure arithmetic.

Addresses must not change while a captured graph is used, and memory must not grow: so everything of
a step has its offset in one arena, worked out from the step's size alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmforge.backends import LoadOptions
from vlmforge.backends.cuda.device import ITEM_BYTES
from vlmforge.backends.number_formats import DTYPES
from vlmforge.engine.chain import ChainStep, PartChain, TensorSpec
from vlmforge.engine.interface import BATCH, BLOCK_TABLE, OUTPUTS, QUERY_LENGTHS, ROWS, TOKENS

ALIGNMENT = 256
PAST = TensorSpec("past_lengths.int32", "int32", (BATCH,))
"""As the attention's kernels take them."""
MOST_OUTPUTS = 512
"""Positions of a prompt whose logits are wanted, at once (see `Scheduler`)."""
_LEAST_TOTAL = 256
_CACHES = ("past_key.", "past_value.")


@dataclass(frozen=True, slots=True)
class Size:
    """The dimensions of a step.

    Attributes:
        batch, tokens: Rows, and tokens of each.
        outputs: Positions of each row whose logits are wanted.
        rows: Of image features.
        total: No row has more tokens than this, past and new.
    """

    batch: int
    tokens: int
    outputs: int
    rows: int
    total: int

    @property
    def dims(self) -> Mapping[str, int]:
        """Sizes by the dimensions' names."""
        return {BATCH: self.batch, TOKENS: self.tokens, OUTPUTS: self.outputs, ROWS: self.rows}

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Of a tensor of the decoder."""
        return shape_of(spec, self.dims)

    @property
    def replayed(self) -> bool:
        """Whether steps of this size come again and again."""
        return self.tokens == self.outputs == self.rows == 1


def bucket(size: Size, slots: int, capacity: int) -> Size:
    """The size that a step is run with: few different ones, each not much larger than asked for."""
    total = min(capacity, _round_up(max(size.total, _LEAST_TOTAL)))
    if not size.replayed:
        return replace(size, total=total)
    batch = 1 << (size.batch - 1).bit_length()
    return replace(size, batch=min(batch, slots), total=total)


def largest(options: LoadOptions) -> tuple[Size, ...]:
    """No step needs more than the largest of these."""
    chunk = min(options.chunk, options.capacity)
    return (
        Size(1, chunk, min(chunk, MOST_OUTPUTS), chunk, options.capacity),
        Size(options.slots, 1, 1, 1, options.capacity),
    )


def _round_up(number: int) -> int:
    """To a power of two, or one and a half of one."""
    power = 1 << (number - 1).bit_length()
    return power * 3 // 4 if number <= power * 3 // 4 else power


def inputs_of(inputs: Iterable[TensorSpec], columns: int) -> tuple[TensorSpec, ...]:
    """What is uploaded for a step: all that a decoder takes but its caches, and the attention.

    `columns`: of the block table, the most pages of a sequence.
    """
    table = replace(BLOCK_TABLE, shape=(BATCH, columns))
    own = (spec for spec in inputs if not spec.name.startswith(_CACHES))
    return (PAST, QUERY_LENGTHS, table, *own)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Offsets in the arena by the tensors' names.

    Attributes:
        offsets: Of everything.
        uploaded: Bytes from the beginning on that are uploaded for each step.
        size: Of all.
    """

    offsets: Mapping[str, int]
    uploaded: int
    size: int

    def view(
        self, inputs: NDArray[np.uint8], spec: TensorSpec, dims: Mapping[str, int]
    ) -> NDArray[Any]:
        """The place of one input in all that is uploaded; numbers of 16 bits as their bits."""
        shape, dtype = shape_of(spec, dims), np.dtype(DTYPES.get(spec.dtype, spec.dtype))
        begin = self.offsets[spec.name]
        part: NDArray[Any] = inputs[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype)
        return part.reshape(shape)


def arrange(chain: PartChain, inputs: Sequence[TensorSpec], size: Size) -> Arrangement:
    """Inputs one after the other, and behind them the tensors between steps.

    A tensor's place is free for others as soon as no later step takes it.
    """
    offsets, end = {}, 0
    for spec in inputs:
        offsets[spec.name], end = end, end + _bytes(spec, size.dims)
    specs = tensors_of(chain)
    last = {
        name: index
        for index, step in enumerate(chain.steps)
        for name in sorted(step.taken | step.given)
    }
    living: dict[str, tuple[int, int]] = {}  # by name: begin and end
    most = end
    for index, step in enumerate(chain.steps):
        names = _given(step)
        living = {name: place for name, place in living.items() if last[name] >= index}
        for name in names:
            needed = _bytes(specs[name], size.dims)
            begin = _gap(sorted(living.values()), end, needed)
            offsets[name] = begin
            living[name] = (begin, begin + needed)
            most = max(most, begin + needed)
    return Arrangement(offsets, end, most)


def in_a_row(
    inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], dims: Mapping[str, int]
) -> Arrangement:
    """Inputs one after the other, outputs behind them; `dims` are sizes by dimensions' names."""
    offsets, end = {}, 0
    for spec in inputs:
        offsets[spec.name], end = end, end + _bytes(spec, dims)
    uploaded = end
    for spec in outputs:
        offsets[spec.name], end = end, end + _bytes(spec, dims)
    return Arrangement(offsets, uploaded, end)


def made_by(chain: PartChain, name: str) -> int:
    """The step that gives a tensor."""
    return next(index for index, step in enumerate(chain.steps) if name in step.given)


def tensors_of(chain: PartChain) -> Mapping[str, TensorSpec]:
    """All tensors by name: what segments take and give, and sums that are only added to others."""
    found = {s.name: s for seg in chain.segments for s in (*seg.inputs, *seg.outputs)}
    for call in chain.collectives:
        for name in call.given if call.norm is not None else ():
            found[name] = replace(found[call.tensor], name=name)
    return found


def _given(step: ChainStep) -> tuple[str, ...]:
    """Names of what a step gives, in one order always."""
    if step.segment is not None:
        return tuple(spec.name for spec in step.segment.outputs)
    return tuple(sorted(step.given))


def _gap(taken: Sequence[tuple[int, int]], start: int, needed: int) -> int:
    """The first place from `start` on where `needed` bytes are free."""
    for begin, end in taken:
        if begin - start >= needed:
            break
        start = max(start, end)
    return start


def shape_of(spec: TensorSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor where its dimensions have these sizes."""
    return tuple(dim if isinstance(dim, int) else dims[dim] for dim in spec.shape)


def _bytes(spec: TensorSpec, dims: Mapping[str, int]) -> int:
    exact = math.prod(shape_of(spec, dims)) * ITEM_BYTES[spec.dtype]
    return -(-exact // ALIGNMENT) * ALIGNMENT
