"""What differs between a decoder that is a chain and one that is a plan; the rest they share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

from vlmforge.backends.cuda.device import ITEM_BYTES, Device, Memory, Work
from vlmforge.backends.cuda.frames import Arrangement, Size
from vlmforge.engine.manifest import KVLayout
from vlmforge.engine.tensors import TensorSpec

FEW = 0
"""Rows for which the host finds the largest logits sooner than the GPU."""


class Pools(Struct, frozen=True):
    """The key/value cache: for each layer a pool of keys and one of values, `pages` pages each.

    Attributes:
        page_bytes: Of a page of one pool.
    """

    memory: Memory
    layers: int
    pages: int
    page_bytes: int

    def of(self, layer: int) -> tuple[int, int]:
        """Addresses of a layer's keys and of its values, `[pages, kv_heads, page_size, D]`."""
        size = self.pages * self.page_bytes
        keys = self.memory.address + 2 * layer * size
        return keys, keys + size

    def copy(self, device: Device, source: int, target: int) -> None:
        """Enqueue a copy of one page over another, in every pool."""
        for layer in range(self.layers):
            for pool in self.of(layer):
                taken, given = (pool + page * self.page_bytes for page in (source, target))
                device.copy(taken, given, self.page_bytes)


def make_pools(device: Device, kv: KVLayout, pages: int) -> Pools:
    """Memory for `pages` pages of every layer (EngineError: there is not as much)."""
    assert kv.page_size is not None
    page_bytes = math.prod((kv.kv_heads, kv.page_size, kv.head_dim)) * ITEM_BYTES[kv.dtype]
    memory = device.allocate(2 * kv.layers * pages * page_bytes)
    return Pools(memory, kv.layers, pages, page_bytes)


class Span(NamedTuple):
    """A sequence in a packed row: its new tokens, which lie behind those of the spans before it.

    Attributes:
        tokens: So many are new.
        total: So many there are with these.
    """

    tokens: int
    total: int


class Program(Protocol):
    """A decoder as it is loaded on a device.

    Attributes:
        outputs: Of each row, in every step; None: as many as are asked for.
        gives_likeliest: Whether a step of decoding gives `LIKELIEST` too, of more than `FEW` rows.
    """

    outputs: int | None
    gives_likeliest: bool

    def inputs(self, size: Size) -> Sequence[TensorSpec]:
        """What is uploaded for a step of this size."""

    def arrange(self, size: Size) -> Arrangement:
        """Where `inputs` lie, and all that it gives."""

    def bind(
        self, size: Size, at: Mapping[str, int], pools: Pools, spans: Sequence[Span] = ()
    ) -> Work:
        """What enqueues a step, by the addresses of all that is arranged.

        `spans`, where the size is packed, are those of a step when that is enqueued.

        Raises (when called):
            EngineError: the library failed.
        """
