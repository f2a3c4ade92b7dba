"""Chooses kernels, grids, splits and workspace from numbers that the host has. Pure functions.

Nothing here looks at a tensor's contents: lengths are maxima, so that a plan made once can be
captured into a CUDA graph and replayed while the real lengths, which the kernels read, move below
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vlmforge_plugins.cached_attention.config import (
    COMBINE_THREADS,
    PAGE_SIZES,
    WRITE_THREADS,
    Sizes,
)
from vlmforge_plugins.errors import UnsupportedError

ALIGNMENT = 256
MAX_SPLITS = 64
MIN_SPLIT_KEYS = 64  # Splits::kMinKeys
GRID_LIMIT = 65535  # of a grid's y and z
CACHE_BYTES = 24 << 20
NARROW_KEYS = 1024


@dataclass(frozen=True)
class Machine:
    """The GPU at hand: its multiprocessors, and the shared memory that blocks of one can have."""

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Shape:
    """The host-side metadata of one call.

    Attributes:
        batch: Rows, active or not.
        max_query: New tokens of the longest row (the padded S). 1 is decode.
        max_total: No row has more tokens than this, past and new. For decode under a CUDA graph,
            the bucket's upper end; splits are chosen from it.
        heads, kv_heads: Of queries, and of keys and values.
        page_size, max_pages: Tokens of a page, columns of the block table.
        rotary: Whether the kernels rotate queries and keys.
        positions: Rows of the rotary tables.
    """

    batch: int
    max_query: int
    max_total: int
    heads: int
    kv_heads: int
    page_size: int
    max_pages: int
    rotary: bool = True
    positions: int = 1 << 30

    def check(self) -> None:
        """Raises `UnsupportedError` for a shape that the kernels would misread."""
        _need(
            min(self.batch, self.max_query, self.heads, self.kv_heads, self.max_pages) > 0,
            "A dimension of the call is empty.",
            str(self),
            "every dimension at least 1",
        )
        _need(
            self.heads % self.kv_heads == 0,
            "Query heads do not divide evenly among key heads.",
            f"{self.heads} query heads, {self.kv_heads} key heads",
            "a multiple",
        )
        _need(
            self.page_size in PAGE_SIZES,
            "The kernels do not cover this page size.",
            f"pages of {self.page_size} tokens",
            f"one of {', '.join(map(str, PAGE_SIZES))}",
        )
        _need(
            self.max_query <= self.max_total <= self.max_pages * self.page_size,
            "The longest row does not fit its pages.",
            f"{self.max_query} new tokens of {self.max_total} in all",
            f"at most {self.max_pages} pages x {self.page_size} tokens",
        )
        _need(
            not self.rotary or self.max_total <= self.positions,
            "The rotary tables are too short.",
            f"{self.max_total} tokens",
            f"at most {self.positions}, the rows of the tables",
        )
        blocks = max(self.kv_heads * head_tiles(self), self.batch, self.max_query, self.heads)
        _need(
            blocks <= GRID_LIMIT,
            "The call is larger than a grid.",
            str(self),
            f"batch, new tokens and heads at most {GRID_LIMIT} each",
        )


def _need(holds: bool, summary: str, found: str, expected: str) -> None:
    if not holds:
        fix = "this comes from the engine's KV layout; build the engine again with one that fits"
        raise UnsupportedError(summary, found=found, expected=expected, fix=fix)


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, grid, threads of a block, and dynamic shared memory.

    Attributes:
        overlaps: Whether it may start before the kernel in front of it has ended.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    overlaps: bool = False


@dataclass(frozen=True)
class Workspace:
    """Offsets in bytes into one scratch allocation of `size`; the last is of `counters` numbers."""

    rotated: int
    partial_out: int
    partial_lse: int
    arrivals: int
    counters: int
    size: int


@dataclass(frozen=True)
class Plan:
    """All that a call launches, in order.

    Attributes:
        splits: Into which decode cuts the keys of the longest row.
        heads_together: Heads whose blocks of prefill run at the same time.
        tiled: Whether a kernel reads the pools through tensor maps.
    """

    shape: Shape
    head_size: int
    splits: int
    heads_together: int
    launches: tuple[Launch, ...]
    workspace: Workspace
    tiled: bool = False


def apart(chosen: Plan) -> Plan:
    """The same, each kernel launched when the one in front of it has ended; for comparison."""
    launches = tuple(replace(launch, overlaps=False) for launch in chosen.launches)
    return replace(chosen, launches=launches)


def head_tiles(shape: Shape) -> int:
    """Tensor-core tiles of 16 rows that the query heads of one key head fill in decode."""
    return -(-(shape.heads // shape.kv_heads) // 16)


def split_keys(total: int, splits: int) -> int:
    """Keys of a split when a row of `total` tokens is cut for decode; as `Splits` in params.h."""
    even = -(-total // splits)
    return max(-(-even // 64) * 64, MIN_SPLIT_KEYS)


def choose_splits(shape: Shape, sizes: Sizes, machine: Machine) -> int:
    """Splits of the longest row that take the least time, as measured on an H200.

    Half of a block's time is its own keys', half its share of all, for a machine that is half full
    reads at nearly its full rate. Adding up the splits costs as much as about 130 keys, and a
    little more for each; more splits must win by 5 %.
    """
    blocks = shape.batch * shape.kv_heads * head_tiles(shape)
    slots = decode_slots(sizes, machine)
    limit = split_limit(shape, sizes, machine)

    def cost(splits: int) -> float:
        share = blocks * splits / slots
        # The last round is as long as a full one only when there are few of them.
        rounds = max(1.0, math.ceil(share) if share < 4 else share + 0.5)
        keys = split_keys(shape.max_total, splits)
        adding = 130 + 4 * splits if splits > 1 else 0
        return (share + 0.5 * rounds) * keys + 64 * rounds + adding

    best = 1
    for splits in range(2, limit + 1):
        if cost(splits) < 0.95 * cost(best):
            best = splits
    return best


def decode_slots(sizes: Sizes, machine: Machine) -> int:
    """Blocks of decode that the machine runs at once."""
    by_shared = machine.shared_bytes // (sizes.decode_bytes + 1024)
    by_registers = 65536 // (32 * sizes.decode_warps * sizes.decode_registers)
    return machine.multiprocessors * max(1, min(by_shared, by_registers))


def split_limit(shape: Shape, sizes: Sizes, machine: Machine) -> int:
    """No more splits than go round the machine four times, or have keys enough."""
    blocks = shape.batch * shape.kv_heads * head_tiles(shape)
    full = max(1, 4 * decode_slots(sizes, machine) // blocks)
    return min(MAX_SPLITS, full, -(-shape.max_total // MIN_SPLIT_KEYS))


def heads_together(shape: Shape, sizes: Sizes) -> int:
    """Query heads whose keys and values take about half of a large L2 cache, in even groups."""
    width = 1 if sizes.config.fp8 else 2
    of_a_head = 2 * shape.max_total * sizes.config.head_size * width
    groups = -(-shape.kv_heads // max(1, CACHE_BYTES // of_a_head))
    return -(-shape.kv_heads // groups) * (shape.heads // shape.kv_heads)


def workspace(shape: Shape, head_size: int, splits: int) -> Workspace:
    """Scratch for prefill's rotated queries, decode's partial results, and what blocks count."""
    rotate = shape.rotary and shape.max_query > 1
    rotated = 2 * shape.batch * shape.max_query * shape.heads * head_size if rotate else 0
    slots = shape.batch * shape.heads * splits if splits > 1 else 0
    partial_out = _aligned(rotated)
    partial_lse = partial_out + _aligned(4 * slots * head_size)
    arrivals = partial_lse + _aligned(4 * slots)
    tiles = shape.batch * shape.kv_heads * head_tiles(shape) if splits > 1 else 0
    counters = 1 if shape.max_query > 1 else tiles
    size = arrivals + _aligned(4 * counters)
    return Workspace(0, partial_out, partial_lse, arrivals, counters, size)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan(shape: Shape, sizes: Sizes, machine: Machine) -> Plan:
    """What to launch for a call of this shape.

    Raises:
        UnsupportedError: No kernel covers it.
    """
    sizes.config.check()
    shape.check()
    decode = shape.max_query == 1
    splits = choose_splits(shape, sizes, machine) if decode else 1
    narrow = decode and narrow_blocks(shape, sizes, splits, machine)
    attention = _decode(shape, sizes, splits, narrow) if decode else _prefill(shape, sizes, machine)
    head_size = sizes.config.head_size
    return Plan(
        shape,
        head_size,
        splits,
        heads_together(shape, sizes),
        (_write(shape, sizes), *attention),
        workspace(shape, head_size, splits),
        tiled=sizes.hopper and not sizes.config.fp8 and not decode,
    )


def max_workspace(largest: Shape, sizes: Sizes, machine: Machine) -> int:
    """Bytes that suffice for every call of at most this shape, prefill or decode."""
    head_size = sizes.config.head_size
    decodes = [replace(largest, batch=b, max_query=1) for b in range(1, largest.batch + 1)]
    needs = [workspace(s, head_size, split_limit(s, sizes, machine)).size for s in decodes]
    return max(workspace(largest, head_size, 1).size, *needs)


def _write(shape: Shape, sizes: Sizes) -> Launch:
    rotate = shape.rotary and shape.max_query > 1  # decode rotates its queries itself
    heads = 2 * shape.kv_heads + (shape.heads if rotate else 0)
    blocks = -(-heads * (sizes.config.head_size // 8) // WRITE_THREADS)
    grid = (blocks, shape.max_query, shape.batch)
    return Launch("vf_write", grid, WRITE_THREADS, overlaps=sizes.overlap)


def narrow_blocks(shape: Shape, sizes: Sizes, splits: int, machine: Machine) -> bool:
    """Whether decode takes narrow blocks, so that one's start and merge meet another's reads.

    For more blocks than run at once, if these are soon done: measured on an H200 and an H100.
    """
    blocks = shape.batch * shape.kv_heads * head_tiles(shape)
    many = splits == 1 and blocks > decode_slots(sizes, machine)
    return many and sizes.narrow_warps < sizes.decode_warps and shape.max_total <= NARROW_KEYS


def _decode(shape: Shape, sizes: Sizes, splits: int, narrow: bool = False) -> tuple[Launch, ...]:
    grid = (splits, shape.kv_heads * head_tiles(shape), shape.batch)
    if narrow:
        sizes = sizes.narrow
    name = "vf_decode_narrow" if narrow else "vf_decode"
    attend = Launch(name, grid, 32 * sizes.decode_warps, sizes.decode_bytes, sizes.overlap)
    if splits == 1 or sizes.fused:
        return (attend,)
    heads = -(-shape.heads // (COMBINE_THREADS // 32))
    return (attend, Launch("vf_combine", (heads, 1, shape.batch), COMBINE_THREADS))


def _prefill(shape: Shape, sizes: Sizes, machine: Machine) -> tuple[Launch, ...]:
    blocks = -(-shape.max_query // sizes.prefill_rows) * shape.heads
    grid = (blocks, 1, shape.batch)
    if sizes.hopper:  # these stay, and take one block of queries after the other
        grid = (min(blocks * shape.batch, machine.multiprocessors), 1, 1)
    overlaps = sizes.overlap and sizes.hopper
    return (Launch("vf_prefill", grid, sizes.prefill_threads, sizes.prefill_bytes, overlaps),)
