"""The attention kernels against torch's SDPA on one GPU, through the plugin's own launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu_timing import Work, copy_bandwidths, matmul_rate, medians, read_bandwidth
from vlmforge_plugins.cached_attention.config import Config, Sizes
from vlmforge_plugins.cached_attention.launcher import Kernels, Rows, Scales, Tensors, run
from vlmforge_plugins.cached_attention.plan import Machine, Plan, Shape, apart, plan

HEADS = 32
D = 128
PAGE = 64
CACHE_BYTES = 512 << 20  # a round reads at least this much: several times any L2
BUFFER_BYTES = 40 << 30
POSITIONS = 32768
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Point:
    """What is timed: `past` tokens are in the cache, `new` come, in each of `batch` rows."""

    batch: int
    past: int
    new: int
    kv_heads: int
    activation: str = "float16"
    stored: str = "float16"
    heads: int = HEADS
    head_size: int = D
    page_size: int = PAGE

    @property
    def total(self) -> int:
        """Tokens of a row, past and new."""
        return self.past + self.new

    @property
    def config(self) -> Config:
        """Whose kernels it takes."""
        return Config(self.head_size, self.activation, self.stored)  # type: ignore[arg-type]

    @property
    def pool_bytes(self) -> int:
        """Of the keys, or of the values, in whole pages."""
        pages = self.batch * -(-self.total // self.page_size)
        width = 1 if self.config.fp8 else 2
        return pages * self.page_size * self.kv_heads * self.head_size * width

    @property
    def bytes_moved(self) -> int:
        """The fewest: every cached token of every row once, queries and outputs once."""
        width = 1 if self.config.fp8 else 2
        cached = 2 * self.batch * self.total * self.kv_heads * self.head_size * width
        return cached + 2 * 2 * self.batch * self.new * self.heads * self.head_size

    @property
    def operations(self) -> int:
        """Multiplications and additions of the visible scores."""
        visible = self.new * self.past + self.new * (self.new + 1) // 2
        return 4 * self.batch * self.heads * self.head_size * visible


class Stage:
    """Buffers that all points share: random numbers for the pools, made once."""

    def __init__(self) -> None:
        self.buffer = torch.empty(BUFFER_BYTES // 2, dtype=torch.float16, device="cuda")
        for part in self.buffer.split(1 << 30):
            part.normal_()
        self.angles = torch.rand(POSITIONS, 64, device="cuda")  # their cosines, and sines

    def rounds(self, point: Point) -> list[int]:
        """Byte offsets of disjoint pools (keys, then values) that a round walks through.

        At least 12 where there is room: the start of a graph, some microseconds, is not ours.
        """
        both = 2 * point.pool_bytes
        wanted = min(max(-(-CACHE_BYTES // both), 12), 24)
        return [i * both for i in range(min(wanted, BUFFER_BYTES // both))]

    def ours(
        self,
        point: Point,
        kernels: Kernels,
        sizes: Sizes,
        machine: Machine,
        change: Callable[[Plan], Plan] = lambda chosen: chosen,
        ordered: bool = False,
        write: bool = False,
    ) -> list[Work]:
        """Attention; the new tokens are rotated already and in the pools, or `write` does both.

        `change` makes a variant of the plan; `ordered` lays the pages down in order.
        """
        shape = Shape(
            point.batch,
            point.new,
            point.total,
            point.heads,
            point.kv_heads,
            point.page_size,
            -(-point.total // point.page_size),
            rotary=write,
            positions=POSITIONS,
        )
        chosen = change(plan(shape, sizes, machine))
        if not write:
            chosen = replace(chosen, launches=chosen.launches[1:])
        tensors = [
            self._tensors(point, shape, chosen, offset, ordered) for offset in self.rounds(point)
        ]
        scales = Scales(point.head_size**-0.5)
        return [partial(self._run, chosen, t, scales, kernels) for t in tensors]

    def _run(self, chosen: Plan, kept: tuple[Tensors, Any], scales: Scales, k: Kernels) -> None:
        run(chosen, kept[0], scales, k, torch.cuda.current_stream().cuda_stream)

    def _tensors(
        self, point: Point, shape: Shape, chosen: Plan, offset: int, ordered: bool
    ) -> tuple[Tensors, Any]:
        width = point.heads * point.head_size
        size = (point.batch, point.new, width)
        query = torch.randn(size, device="cuda").to(DTYPES[point.activation])
        out = torch.empty_like(query)
        lengths = torch.full((point.batch,), point.past, dtype=torch.int32, device="cuda")
        pages = point.batch * shape.max_pages
        place = torch.arange if ordered else torch.randperm
        table = place(pages, device="cuda", dtype=torch.int32)
        scratch = torch.zeros(chosen.workspace.size + 256, dtype=torch.uint8, device="cuda")
        rows = [Rows(t.data_ptr(), point.new * width, width) for t in (query, out)]
        start = self.buffer.data_ptr() + offset
        tensors = Tensors(
            rows[0],
            rows[0],
            rows[0],
            rows[1],
            start,
            start + point.pool_bytes,
            pages,
            self.angles.data_ptr() if shape.rotary else 0,
            self.angles.data_ptr() if shape.rotary else 0,
            lengths.data_ptr(),
            0,
            table.data_ptr(),
            scratch.data_ptr(),
        )
        return tensors, (query, out, lengths, table, scratch)

    def sdpa(self, point: Point, backend: SDPBackend, write: bool = False) -> list[Work]:
        """torch's attention on dense caches of the same size, which it need not look up.

        With `write`, behind a copy of the new keys and values to their places, one kernel.
        """
        dtype = DTYPES[point.activation]
        size = (point.batch, point.kv_heads, point.total, point.head_size)
        count = point.batch * point.kv_heads * point.total * point.head_size
        q = torch.randn(point.batch, point.heads, point.new, point.head_size, device="cuda")
        q = q.to(dtype)
        causal = point.new > 1
        if causal and point.past:
            return []  # its causal mask is anchored at the upper left: another function
        works = []
        for offset in self.rounds(replace(point, stored=point.activation)):
            halves = self.buffer[offset // 2 : offset // 2 + 2 * count].view(dtype)
            cache = halves.view(2, *size)
            new = cache[:, :, :, -point.new :].clone() if write else None
            works.append(partial(_sdpa, backend, q, cache, new, causal))
        return works


def _sdpa(backend: SDPBackend, q: Any, cache: Any, new: Any, causal: bool) -> None:
    k, v = cache
    with sdpa_kernel(backend):
        if new is not None:
            cache[:, :, :, -new.shape[3] :].copy_(new)
        scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def decode_points() -> Iterator[Point]:
    """Batch 1..256 x context 512..32k x (MHA, GQA 4, GQA 8), what fits; some in other formats."""
    for kv_heads in (32, 8, 4):
        for batch in (1, 4, 16, 64, 256):
            for context in (512, 2048, 4096, 8192, 32768):
                point = Point(batch, context - 1, 1, kv_heads)
                if 2 * point.pool_bytes <= BUFFER_BYTES:
                    yield point
    yield Point(16, 8191, 1, 8, page_size=16)
    yield Point(16, 8191, 1, 8, page_size=128)
    yield Point(16, 8191, 1, 8, "bfloat16", "bfloat16")
    yield Point(16, 8191, 1, 8, stored="float8_e4m3fn")
    yield Point(64, 8191, 1, 32, stored="float8_e4m3fn")
    for head_size in (64, 80, 96, 104):
        yield Point(32, 8191, 1, 8, head_size=head_size)


def prefill_points() -> Iterator[Point]:
    """Whole prompts, and chunks on top of a long past."""
    for kv_heads in (32, 8, 4):
        for batch, new in ((1, 2048), (4, 2048), (1, 8192), (4, 8192), (1, 16384)):
            yield Point(batch, 0, new, kv_heads)
    yield Point(4, 0, 8192, 8, "bfloat16", "bfloat16")
    yield Point(1, 14336, 2048, 8)
    yield Point(4, 14336, 512, 8)
    yield Point(2, 0, 4096, 8, stored="float8_e4m3fn")
    for head_size in (64, 80, 96, 104):
        yield Point(4, 0, 4096, 8, head_size=head_size)


def measure(
    point: Point, stage: Stage, kernels: Kernels, sizes: Sizes, machine: Machine
) -> dict[str, Any]:
    """Seconds of ours (as launched, apart, and with the write) and of torch's, for the report."""
    contestants = {
        "ours": stage.ours(point, kernels, sizes, machine),
        "apart": stage.ours(point, kernels, sizes, machine, apart),
        "with write": stage.ours(point, kernels, sizes, machine, write=True),
    }
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        if works := stage.sdpa(point, backend):
            contestants[name] = works
    if point.new == 1:
        contestants["cudnn with write"] = stage.sdpa(point, SDPBackend.CUDNN_ATTENTION, write=True)
    row = asdict(point) | {"seconds": medians(contestants)}
    return row | {"bytes": point.bytes_moved, "operations": point.operations}


def ceilings() -> dict[str, Any]:
    """What this GPU does at most, measured."""
    copies = copy_bandwidths()
    return {
        "copy_bytes_per_second": max(copies.values()),
        "copies": copies,
        "read_bytes_per_second": read_bandwidth(),
        "matmul_float16": matmul_rate(torch.float16),
        "matmul_bfloat16": matmul_rate(torch.bfloat16),
    }
