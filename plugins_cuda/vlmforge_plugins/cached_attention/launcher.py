"""Launches a plan on a stream: no allocation, no synchronisation, no look at device memory."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Protocol

from vlmforge_plugins.cached_attention.plan import Launch, Plan

MAP_BYTES = 128  # of a CUtensorMap


class Params(ctypes.Structure):
    """`vf::Params` of kernels/params.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_byte * MAP_BYTES) for name in ("key_map", "value_map")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "key_pool", "value_pool")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "past_lengths", "query_lengths")),
        *((name, ctypes.c_void_p) for name in ("block_table", "out")),
        *(
            (name, ctypes.c_void_p)
            for name in ("rotated", "partial_out", "partial_lse", "arrivals")
        ),
        *((name, ctypes.c_longlong) for name in ("query_batch", "query_row")),
        *((name, ctypes.c_longlong) for name in ("key_batch", "key_row")),
        *((name, ctypes.c_longlong) for name in ("value_batch", "value_row")),
        *((name, ctypes.c_longlong) for name in ("out_batch", "out_row")),
        *((name, ctypes.c_int) for name in ("batch", "max_query", "heads", "kv_heads")),
        *((name, ctypes.c_int) for name in ("max_pages", "page_shift", "splits", "heads_together")),
        ("counters", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("scale_log2", "key_inverse_scale")),
        *((name, ctypes.c_float) for name in ("value_inverse_scale", "value_scale")),
        ("_end", ctypes.c_byte * 20),  # the maps are aligned to 64 bytes, so all is
    ]


@dataclass(frozen=True)
class Rows:
    """Where the new tokens of one tensor are: token (b, s) at `address` + b, s by the strides.

    Attributes:
        address: Of the first element; 16-byte aligned.
        batch_stride, row_stride: In elements, multiples of 8. Heads of a token are contiguous, so
            that a query may be a slice of a packed [B, S, (heads + 2 kv_heads) * D] tensor.
    """

    address: int
    batch_stride: int
    row_stride: int


@dataclass(frozen=True)
class Tensors:
    """Device addresses of a call; see kernels/params.h for the shapes. 0 where optional.

    Attributes:
        query, key, value, out: New tokens, and the attention output.
        key_pool, value_pool: `[pages, kv_heads, page_size, D]`.
        pages: Of each pool.
        cos, sin: fp32 `[positions, D / 2]`, or 0: query and key carry their positions already.
        past_lengths: int32 `[B]`.
        query_lengths: int32 `[B]`, 0 for an inactive row; or 0 (none): all rows have max_query.
        block_table: int32 `[B, max_pages]`.
        workspace: `Plan.workspace.size` bytes, aligned to 256.
    """

    query: Rows
    key: Rows
    value: Rows
    out: Rows
    key_pool: int
    value_pool: int
    pages: int
    cos: int
    sin: int
    past_lengths: int
    query_lengths: int
    block_table: int
    workspace: int


@dataclass(frozen=True)
class Scales:
    """Factor on the scores, and what one unit of an fp8 pool is worth (1 for other pools)."""

    score: float
    key: float = 1.0
    value: float = 1.0


@dataclass(frozen=True)
class Boxes:
    """A pool as the driver describes it to the hardware that copies tiles: see TileMap in params.h.

    Attributes:
        address: Of the pool, 16-byte aligned.
        rows, columns: Its elements, two bytes each: pages * kv_heads * page_size, and D.
        box_rows: Rows that are copied at once: a page.
    """

    address: int
    rows: int
    columns: int
    box_rows: int


class Kernels(Protocol):
    """Compiled kernels of one configuration on one machine."""

    def tile_map(self, boxes: Boxes) -> bytes:
        """The driver's description of a pool, `MAP_BYTES` long. Touches no device memory."""

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        """Enqueues one kernel. `params` is read before this returns."""


def parameters(plan: Plan, tensors: Tensors, scales: Scales, kernels: Kernels) -> Params:
    """The kernels' argument for a call."""
    shape, scratch = plan.shape, plan.workspace
    rows = tensors.pages * shape.kv_heads * shape.page_size
    maps = {}
    if plan.tiled:
        for name, pool in (("key_map", tensors.key_pool), ("value_map", tensors.value_pool)):
            boxes = Boxes(pool, rows, plan.head_size, shape.page_size)
            maps[name] = (ctypes.c_byte * MAP_BYTES).from_buffer_copy(kernels.tile_map(boxes))
    return Params(
        **maps,
        query=tensors.query.address,
        key=tensors.key.address,
        value=tensors.value.address,
        key_pool=tensors.key_pool,
        value_pool=tensors.value_pool,
        cos=tensors.cos or None,
        sin=tensors.sin or None,
        past_lengths=tensors.past_lengths,
        query_lengths=tensors.query_lengths or None,
        block_table=tensors.block_table,
        out=tensors.out.address,
        rotated=tensors.workspace + scratch.rotated,
        partial_out=tensors.workspace + scratch.partial_out,
        partial_lse=tensors.workspace + scratch.partial_lse,
        arrivals=tensors.workspace + scratch.arrivals,
        query_batch=tensors.query.batch_stride,
        query_row=tensors.query.row_stride,
        key_batch=tensors.key.batch_stride,
        key_row=tensors.key.row_stride,
        value_batch=tensors.value.batch_stride,
        value_row=tensors.value.row_stride,
        out_batch=tensors.out.batch_stride,
        out_row=tensors.out.row_stride,
        batch=shape.batch,
        max_query=shape.max_query,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        max_pages=shape.max_pages,
        page_shift=shape.page_size.bit_length() - 1,
        splits=plan.splits,
        heads_together=plan.heads_together,
        counters=scratch.counters,
        scale_log2=scales.score * scales.key * math.log2(math.e),
        key_inverse_scale=1.0 / scales.key,
        value_inverse_scale=1.0 / scales.value,
        value_scale=scales.value,
    )


def run(plan: Plan, tensors: Tensors, scales: Scales, kernels: Kernels, stream: int) -> None:
    """Enqueues a call on `stream`. Capturable into a CUDA graph.

    Raises:
        LaunchError: The driver refused a kernel.
    """
    params = parameters(plan, tensors, scales, kernels)
    for launch in plan.launches:
        kernels.launch(launch, params, stream)
