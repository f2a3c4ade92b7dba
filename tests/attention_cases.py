"""Cases for the attention kernels: random paged batches, a float64 reference, and the verdict.

Needs numpy only, so that the same cases run on a GPU machine without the rest of the repository.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmforge.backends.number_formats import DTYPES, decode, encode, rounded
from vlmforge_plugins.cached_attention.config import (
    HEAD_SIZES,
    PAGE_SIZES,
    TARGETS,
    Config,
    Target,
    sizes,
)
from vlmforge_plugins.cached_attention.launcher import Scales
from vlmforge_plugins.cached_attention.plan import Shape

LENGTHS = (1, 19, 63, 64, 65, 989, 4097)
GROUPS = (1, 4, 7, 8, 20)
KINDS = ("decode", "prefill", "chunk")
TYPES = (
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("float16", "float8_e4m3fn"),
    ("bfloat16", "float8_e4m3fn"),
)
CHECKED_ROWS = 192  # of a sequence of more than MANY_ROWS, where the reference is slow for all
MANY_ROWS = 512


@dataclass(frozen=True)
class Case:
    """One point of the grid. `length` is the longest row's tokens, past and new."""

    kind: str
    activation: str
    stored: str
    head_size: int
    group: int
    length: int
    page_size: int

    @property
    def name(self) -> str:
        return (
            f"{self.kind}-{self.activation}-{self.stored}-d{self.head_size}-gqa{self.group}"
            f"-len{self.length}-page{self.page_size}"
        )

    @property
    def config(self) -> Config:
        return Config(self.head_size, self.activation, self.stored)  # type: ignore[arg-type]

    @cached_property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    @property
    def rotary(self) -> bool:
        return self.seed % 4 != 0

    @property
    def packed(self) -> bool:
        """Whether query, key and value are slices of one tensor."""
        return self.seed % 8 < 4

    @property
    def target(self) -> Target:
        """Whose kernels the host build runs: Hopper's own, or those of all others."""
        return next(t for t in TARGETS if t.name == ("sm_90" if self.seed % 3 else "sm_89"))

    @property
    def work(self) -> int:
        """Products that the longest row takes, about."""
        queries = {"decode": 1, "chunk": 70, "prefill": self.length}[self.kind]
        return queries * self.length * self.heads * self.head_size

    @property
    def kv_heads(self) -> int:
        return 1 if self.length > 1000 or self.group > 8 else 2

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


def grid() -> Iterator[Case]:
    """Everything that acceptance asks for."""
    points = product(KINDS, TYPES, HEAD_SIZES, GROUPS, LENGTHS, PAGE_SIZES)
    for kind, types, head_size, group, length, page_size in points:
        yield Case(kind, *types, head_size, group, length, page_size)


def _key(case: Case) -> tuple[Any, ...]:
    types = (case.activation, case.stored)
    return (case.kind, types, case.head_size, case.group, case.length, case.page_size)


def covering(strength: int) -> list[Case]:
    """Few cases in which any `strength` axes take every combination of values. Deterministic.

    Greedy: of a fixed pseudo-random sample of the grid, the case that covers most of what is open;
    of several the one whose kernels are built already, and that is run soonest. A long prefill is
    slow, and what covers much is large: so of each family the smallest of each length come first.
    """
    cases = list(grid())
    slow = (case for case in cases if case.kind == "prefill" and case.length > 512)
    least = {
        (case.length, sizes(case.config, case.target).hopper): case
        for case in sorted(slow, key=lambda case: -case.work)
    }
    axes = list(combinations(range(6), strength))
    tuples = [[(a, tuple(key[i] for i in a)) for a in axes] for key in map(_key, cases)]
    missing = {t for ts in tuples for t in ts}
    random = np.random.default_rng(10)
    chosen: list[Case] = []
    built: set[tuple[Config, str]] = set()

    def worth(i: int) -> tuple[int, bool, int]:
        case = cases[i]
        return (
            sum(t in missing for t in tuples[i]),
            (case.config, case.target.name) in built,
            -case.work,
        )

    def choose(i: int) -> None:
        chosen.append(cases[i])
        built.add((cases[i].config, cases[i].target.name))
        missing.difference_update(tuples[i])

    for case in least.values():
        choose(cases.index(case))
    while missing:
        best = max(random.choice(len(cases), 1600, replace=False), key=worth)
        if missing.isdisjoint(tuples[best]):
            best = next(i for i, ts in enumerate(tuples) if missing.intersection(ts))
        choose(best)
    return chosen


@dataclass
class Batch:
    """Arrays of a case, as bits where numpy has no type. Whatever no kernel may write is NaN."""

    case: Case
    shape: Shape
    scales: Scales
    arrays: dict[str, NDArray[Any]]
    strides: dict[str, tuple[int, int]]  # of query, key, value, out: batch, row; in elements
    offsets: dict[str, int] = field(default_factory=dict)  # in bytes, into `packed`

    @property
    def past(self) -> NDArray[np.int32]:
        return self.arrays["past_lengths"]

    @property
    def new(self) -> NDArray[np.int32]:
        return self.arrays["query_lengths"]


def _lengths(case: Case, random: np.random.Generator) -> tuple[list[int], list[int]]:
    """Past and new tokens of the rows: the longest, an idle one, a shorter one, a lone token."""
    if case.kind == "decode":
        totals = [case.length, 0, int(random.integers(1, case.length + 1)), 1]
        return [max(t - 1, 0) for t in totals], [1, 0, 1, 1]
    if case.kind == "prefill":
        shorter = int(random.integers(1, case.length + 1))
        return [0, 0, 0, 0], [case.length, 0, min(shorter, 300), 1]
    new = min(case.length, 70)
    other = int(random.integers(1, new + 1))
    past = int(random.integers(0, case.length - other + 1))
    return [case.length - new, 7 % case.length, past, min(case.length - 1, 17)], [new, 0, other, 1]


def make(case: Case) -> Batch:
    """Random data for a case, with poison around it."""
    random = np.random.default_rng(case.seed)
    past, new = _lengths(case, random)
    order = random.permutation(len(past))
    past, new = [past[i] for i in order], [new[i] for i in order]
    max_query = max(new) + (3 if case.kind != "decode" else 0)  # padding columns of a bucket
    max_total = max(p + max_query for p in past)
    pages = -(-max_total // case.page_size) + 1
    shape = Shape(
        len(past),
        max_query,
        max_total,
        case.heads,
        case.kv_heads,
        case.page_size,
        pages,
        case.rotary,
        max_total + 5,
    )
    fp8 = case.stored == "float8_e4m3fn"
    scales = Scales(case.head_size**-0.5, 0.037 if fp8 else 1.0, 0.021 if fp8 else 1.0)
    batch = Batch(case, shape, scales, {}, {})
    batch.arrays["past_lengths"] = np.array(past, np.int32)
    batch.arrays["query_lengths"] = np.array(new, np.int32)
    _tokens(batch, random)
    _pools(batch, random)
    angles = np.outer(
        np.arange(shape.positions), 10000.0 ** -np.linspace(0, 1, case.head_size // 2)
    )
    batch.arrays["cos"] = np.cos(angles).astype(np.float32)
    batch.arrays["sin"] = np.sin(angles).astype(np.float32)
    return batch


def _tokens(batch: Batch, random: np.random.Generator) -> None:
    """Query, key and value (poison in rows that are padding), and a poisoned output."""
    case, shape = batch.case, batch.shape
    d = case.head_size
    widths = {"query": case.heads * d, "key": case.kv_heads * d, "value": case.kv_heads * d}
    total = sum(widths.values())
    values = encode(random.standard_normal((shape.batch, shape.max_query, total)), case.activation)
    for b, n in enumerate(batch.new):
        values[b, n:] = 0xFFFF
    start = 0
    for name, width in widths.items():
        if case.packed:
            batch.arrays["packed"] = values
            batch.offsets[name] = 2 * start
            batch.strides[name] = (shape.max_query * total, total)
        else:
            batch.arrays[name] = np.ascontiguousarray(values[:, :, start : start + width])
            batch.strides[name] = (shape.max_query * width, width)
        start += width
    batch.strides["out"] = (shape.max_query * widths["query"], widths["query"])
    batch.arrays["out"] = np.full(
        (shape.batch, shape.max_query, widths["query"]), 0xFFFF, np.uint16
    )


def tokens(batch: Batch, name: str) -> NDArray[np.float64]:
    """Query, key or value as `[B, S, heads, D]`."""
    case = batch.case
    heads = case.heads if name == "query" else case.kv_heads
    if case.packed:
        start = batch.offsets[name] // 2
        bits = batch.arrays["packed"][:, :, start : start + heads * case.head_size]
    else:
        bits = batch.arrays[name]
    shape = (batch.shape.batch, batch.shape.max_query, heads, case.head_size)
    return decode(np.ascontiguousarray(bits), case.activation).reshape(shape)


def _pools(batch: Batch, random: np.random.Generator) -> None:
    """Pools of poison with the past tokens in pages of random numbers."""
    case, shape = batch.case, batch.shape
    needed = [-(-int(p + n) // case.page_size) for p, n in zip(batch.past, batch.new, strict=True)]
    count = sum(needed) + 3
    free = list(random.permutation(count))
    table = np.full((shape.batch, shape.max_pages), 1 << 30, np.int32)  # using one of these crashes
    dtype = DTYPES[case.stored]
    poison = np.iinfo(dtype).max
    size = (count, case.kv_heads, case.page_size, case.head_size)
    key_pool, value_pool = (np.full(size, poison, dtype) for _ in range(2))
    spread = (1 / batch.scales.key, 1 / batch.scales.value) if case.config.fp8 else (1.0, 1.0)
    for b, pages in enumerate(needed):
        table[b, :pages] = [free.pop() for _ in range(pages)]
        for pool, factor in zip((key_pool, value_pool), spread, strict=True):
            n = int(batch.past[b])
            drawn = random.standard_normal((n, case.kv_heads, case.head_size)) * factor
            position = np.arange(n)
            page = table[b, position // case.page_size]
            pool[page, :, position % case.page_size] = encode(drawn, case.stored)
    batch.arrays |= {"block_table": table, "key_pool": key_pool, "value_pool": value_pool}


def rotate(batch: Batch, x: NDArray[np.float64], b: int) -> NDArray[np.float64]:
    """Rows `[n, heads, D]` of sequence b, rotated to their positions (rotate-half)."""
    if not batch.case.rotary:
        return x
    position = batch.past[b] + np.arange(len(x))
    c, s = (batch.arrays[name][position][:, None].astype(np.float64) for name in ("cos", "sin"))
    x1, x2 = np.split(x, 2, axis=-1)
    return np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1)


def sequence(batch: Batch, pool: NDArray[Any], b: int) -> NDArray[np.float64]:
    """The tokens `[n, kv_heads, D]` that a pool holds of sequence b, without the scale."""
    position = np.arange(batch.past[b] + batch.new[b])
    page = batch.arrays["block_table"][b, position // batch.case.page_size]
    return decode(pool[page, :, position % batch.case.page_size], batch.case.stored)


def verify(batch: Batch, after: dict[str, NDArray[Any]]) -> float:
    """Asserts all that a call promises; returns the worst error as a share of the naive one's."""
    for name in ("key_pool", "value_pool"):
        _verify_pool(batch, name, after[name])
    out = decode(after["out"], batch.case.activation)
    out = out.reshape(*out.shape[:2], batch.case.heads, batch.case.head_size)
    share = 0.0
    for b, n in enumerate(batch.new):
        untouched = after["out"][b, n:]
        assert (untouched == 0xFFFF).all(), f"row {b}: an output after its {n} tokens was written"
        assert np.isfinite(out[b, :n]).all(), f"row {b}: an output is missing or not finite"
        if n > 0:
            share = max(share, _verify_row(batch, after, b, out[b, :n]))
    return share


def _verify_pool(batch: Batch, name: str, after: NDArray[Any]) -> None:
    case = batch.case
    is_key = name == "key_pool"
    unit = batch.scales.key if is_key else batch.scales.value
    expected = batch.arrays[name].copy()
    for b, n in enumerate(batch.new):
        x = tokens(batch, "key" if is_key else "value")[b, :n]
        turned = (rotate(batch, x, b) if is_key else x) / unit
        # As good as rounding to nearest, but for the error of the fp32 rotation.
        slack = 2.0**-22 * np.abs(x).max(initial=0) / unit
        got = sequence(batch, after, b)[batch.past[b] :]
        nearest = np.abs(rounded(turned, case.stored) - turned)
        worst = (np.abs(got - turned) - nearest).max(initial=0)
        assert worst <= slack, f"{name}, row {b}: new tokens are off by {worst:.3g}"
        position = batch.past[b] + np.arange(n)
        page = batch.arrays["block_table"][b, position // case.page_size]
        at = (page, slice(None), position % case.page_size)
        expected[at] = after[at]
    assert (after == expected).all(), f"{name}: something beside the new tokens was written"


def _verify_row(batch: Batch, after: dict[str, Any], b: int, out: NDArray[np.float64]) -> float:
    """The error of one row's output, against twice the error of the same maths done naively."""
    case = batch.case
    keys = sequence(batch, after["key_pool"], b) * batch.scales.key
    values = sequence(batch, after["value_pool"], b) * batch.scales.value
    query = rotate(batch, tokens(batch, "query")[b, : len(out)], b)
    rows = np.arange(len(out))
    if len(rows) > MANY_ROWS:
        random = np.random.default_rng(case.seed)
        drawn = random.choice(rows[:-64], CHECKED_ROWS, replace=False)
        ends = rows[(rows + 1) % 64 < 2]  # of tiles
        rows = np.unique(np.concatenate([drawn, ends, rows[-64:]]))
    error = naive = 0.0
    for h in range(case.heads):
        if h % case.group == 0:
            k, v = keys[:, h // case.group], values[:, h // case.group]
            rough_k, rough_v = rounded(k, case.activation), rounded(v, case.activation)
        q, positions = query[rows, h], batch.past[b] + rows
        exact = attend(q, k, v, positions, batch.scales.score, None)
        rough = attend(q, rough_k, rough_v, positions, batch.scales.score, case.activation)
        error = max(error, np.abs(out[rows, h] - exact).max())
        naive = max(naive, np.abs(rough - exact).max())
    # A lone key makes the naive error zero; leave the rounding of one output.
    allowed = max(
        2 * naive, 2.0**-10 * np.abs(out).max() * (8 if "b" in case.activation[:1] else 1)
    )
    assert error <= allowed, f"row {b}: error {error:.3g}, naively {naive:.3g}"
    return float(error / max(naive, allowed / 2))


def attend(
    q: NDArray[np.float64],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    positions: NDArray[np.integer],
    scale: float,
    kind: str | None,
) -> NDArray[np.float64]:
    """Causal attention of one head; in float64, or with steps rounded to `kind`, as k and v are.

    The naive version has products accumulated in float32, as a library's matmul has.
    """
    visible = np.arange(len(k)) <= positions[:, None]
    if kind is None:
        scores = np.where(visible, q @ k.T * scale, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return p @ v / p.sum(axis=-1, keepdims=True)
    q32, k32, v32 = (x.astype(np.float32) for x in (rounded(q, kind), k, v))
    raw = rounded(rounded(q32 @ k32.T, kind) * scale, kind).astype(np.float32)
    scores = np.where(visible, raw, np.float32(-np.inf))
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p = rounded(p / p.sum(axis=-1, keepdims=True), kind).astype(np.float32)
    return rounded(p @ v32, kind)
