"""How a step lies in the device's memory: sizes, offsets and buckets. Pure arithmetic.

Addresses must not change while a captured graph is used, and memory must not grow: so everything of
a step has its offset in one arena, worked out from the step's size alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from vlmforge.backends import LoadOptions
from vlmforge.backends.cuda.device import ITEM_BYTES
from vlmforge.backends.number_formats import DTYPES
from vlmforge.engine.chain import ChainStep, PartChain
from vlmforge.engine.interface import (
    BATCH,
    BLOCK_TABLE,
    IMAGE_FEATURES,
    OUTPUTS,
    QUERY_LENGTHS,
    ROWS,
    TOKENS,
)
from vlmforge.engine.tensors import TensorSpec

ALIGNMENT = 256
MOST_OUTPUTS = 512
"""Positions of a prompt whose logits are wanted, at once (see `Scheduler`)."""
SEQUENCES = "sequences"
"""The dimension of what attention is told of each sequence."""
PAST = TensorSpec("past_lengths.int32", "int32", (SEQUENCES,))
"""As the attention's kernels take them."""
_LEAST_TOTAL = 256
_STEPS = 5  # bits of a number of tokens that is rounded up: to a 32nd of it, at most
_CACHES = ("past_key.", "past_value.")


class Size(Struct, frozen=True):
    """The dimensions of a step.

    Attributes:
        batch, tokens: Rows, and tokens of each.
        outputs: Positions of each row whose logits are wanted.
        rows: Of image features.
        total: No sequence has more tokens than this, past and new.
        packed: Sequences whose new tokens lie one behind the other in the only row, with the
            outputs of all of them; 0: each has a row.
    """

    batch: int
    tokens: int
    outputs: int
    rows: int
    total: int
    packed: int = 0

    @property
    def sequences(self) -> int:
        """That take part."""
        return self.packed or self.batch

    @property
    def one_each(self) -> bool:
        """Whether the logits of one token of each sequence are wanted."""
        return self.batch * self.outputs == self.sequences

    @property
    def dims(self) -> Mapping[str, int]:
        """Sizes by the dimensions' names."""
        sizes = {BATCH: self.batch, TOKENS: self.tokens, OUTPUTS: self.outputs, ROWS: self.rows}
        return {**sizes, SEQUENCES: self.sequences}

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Of a tensor of the decoder."""
        return shape_of(spec, self.dims)

    @property
    def replayed(self) -> bool:
        """Whether steps of this size come again and again."""
        return not self.packed and self.tokens == self.outputs == self.rows == 1


def bucket(size: Size, slots: int, capacity: int, most: int = 1 << 62) -> Size:
    """The size that a step is run with: few different ones, each not much larger than asked for.

    Those of packed sequences have no more than `most` tokens, and rows of features.
    """
    total = min(capacity, _round_up(max(size.total, _LEAST_TOTAL)))
    if size.packed:
        packed = min(1 << (size.packed - 1).bit_length(), slots)
        outputs = packed if size.one_each else size.outputs
        tokens, rows = (max(n, min(packed_tokens(n), most)) for n in (size.tokens, size.rows))
        return structs.replace(
            size, tokens=tokens, outputs=outputs, rows=rows, total=total, packed=packed
        )
    if not size.replayed:
        return structs.replace(size, total=total)
    batch = 1 << (size.batch - 1).bit_length()
    return structs.replace(size, batch=min(batch, slots), total=total)


def packed_tokens(tokens: int) -> int:
    """So many tokens are run where these are asked for, one behind the other."""
    step = 1 << max(0, tokens.bit_length() - 1 - _STEPS)
    return -(-tokens // step) * step


def most_tokens(options: LoadOptions) -> int:
    """Of a step: prompts, and with those that are packed one of each other sequence."""
    if options.packs:
        return options.chunk + options.slots
    return min(options.chunk, options.capacity)


def largest(options: LoadOptions) -> tuple[Size, ...]:
    """No step needs more than the largest of these."""
    chunk = most_tokens(options)
    packed = options.slots if options.packs else 0
    outputs = max(min(chunk, MOST_OUTPUTS), packed)
    return (
        Size(1, chunk, outputs, chunk, options.capacity, packed),
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
    table = structs.replace(BLOCK_TABLE, shape=(SEQUENCES, columns))
    lengths = structs.replace(QUERY_LENGTHS, shape=(SEQUENCES,))
    own = (spec for spec in inputs if not spec.name.startswith(_CACHES))
    # Features come last: those that are on the device already are not uploaded.
    return (PAST, lengths, table, *sorted(own, key=lambda s: s.name == IMAGE_FEATURES))


class Arrangement(Struct, frozen=True):
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
    specs = chain.tensors
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
