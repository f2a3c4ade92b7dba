"""Launches of the collectives: how a message is cut into them, and what each is told.

No allocation, no synchronisation, no look at device memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.errors import UnsupportedError

MOST_RANKS = 8
THREADS, BLOCKS, REGION = 512, 64, 2048
GROUP = 8  # bytes that one thread gives at once
ROOM = BLOCKS * REGION * GROUP
"""Bytes that a rank may give by one launch."""
ITEM_BYTES: Mapping[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
_KINDS = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
_GATHERS = {2: "vf_gather_16", 4: "vf_gather_32"}
KERNELS = (*(f"vf_sum_{kind}" for kind in _KINDS.values()), *_GATHERS.values())
NORMS = tuple(f"vf_{what}_{kind}" for what in ("sum_norm", "norm") for kind in _KINDS.values())
"""Of engines whose sums are normalised where they are made."""
_NORM_SHARED = 4 * THREADS // 32
_MOST_ITEMS = 1 << 31


def lanes_bytes(size: int) -> int:
    """Memory of a rank's lanes, of `size` ranks; zeroes before they first meet."""
    return 2 * size * BLOCKS * REGION * 2 * GROUP


COUNTS_BYTES = 4 * (BLOCKS + 1)
"""Each block's meetings so far, and a word that says that all is lost."""


class Params(ctypes.Structure):
    """`vf::Params` of kernels/lanes.cuh, field by field.

    An engine's kernels read as many as there were when it was built: new ones come last.
    """

    _fields_ = [
        ("lanes", ctypes.c_void_p * MOST_RANKS),
        *((name, ctypes.c_void_p) for name in ("counts", "stop", "failed", "given", "out")),
        ("patience", ctypes.c_ulonglong),
        *((name, ctypes.c_uint) for name in ("items", "width", "kept", "first", "last", "share")),
        *((name, ctypes.c_int) for name in ("rank", "size")),
        *((name, ctypes.c_void_p) for name in ("added", "scale", "normed")),
        ("epsilon", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Place:
    """Where a rank meets the others.

    Attributes:
        rank: Its number.
        lanes: Addresses of all ranks' lanes as its GPU sees them, by rank.
        counts: `COUNTS_BYTES` of its own memory; zeroes before they first meet.
        stop, failed: 32 bits each of the host's memory, zeroes; see kernels/lanes.cuh.
        patience: Nanoseconds that a launch waits for another rank.
    """

    rank: int
    lanes: tuple[int, ...]
    counts: int
    stop: int
    failed: int
    patience: int


@dataclass(frozen=True)
class Sum:
    """`out = sum of all ranks' given`, `items` numbers of `dtype`; both aligned to 16 bytes.

    The sum is made in float32 in the order of the ranks. `out` may be `given`.
    """

    given: int
    out: int
    items: int
    dtype: str


@dataclass(frozen=True)
class Gather:
    """All ranks' `given` `[rows, width]` side by side into `out` `[rows, kept]`.

    kept <= ranks * width: what is behind falls away. Both aligned to `GROUP` bytes.
    """

    given: int
    out: int
    rows: int
    width: int
    kept: int
    dtype: str

    @property
    def items(self) -> int:
        """Numbers that a rank gives."""
        return self.rows * self.width


@dataclass(frozen=True)
class Norm:
    """`total = given + added`, and `normed` its RMS norm times `scale`, in rows `[rows, width]`.

    `total` is rounded before it is normalised, and may be `given`. All are aligned to 16 bytes, and
    rows are of whole groups, `REGION` at most (see `fits`).
    """

    given: int
    added: int
    scale: int
    total: int
    normed: int
    rows: int
    width: int
    epsilon: float
    dtype: str

    @property
    def items(self) -> int:
        """Numbers that a rank gives."""
        return self.rows * self.width

    @property
    def row_groups(self) -> int:
        """Groups of a row."""
        return self.width * ITEM_BYTES[self.dtype] // GROUP


@dataclass(frozen=True)
class SumNorm(Norm):
    """The same of the sum of all ranks' `given`, as `Sum` makes it."""


N = TypeVar("N", bound=Norm)


class Kernels(Protocol):
    """Compiled kernels on one GPU."""

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        """Enqueues one kernel. `params` is read before this returns."""


Launches = tuple[tuple[Launch, Params], ...]


def row_fits(width: int, item: int) -> bool:
    """Whether rows of so many numbers of `item` bytes can be normalised here."""
    return width * item % GROUP == 0 and 0 < width * item // GROUP <= REGION


def fits(norm: Norm) -> bool:
    """Whether its rows can be normalised here."""
    return norm.dtype in ITEM_BYTES and row_fits(norm.width, ITEM_BYTES[norm.dtype])


def launches(meeting: Sum | Gather | SumNorm, place: Place) -> Launches:
    """What a meeting takes: each gives at most `ROOM` bytes, in blocks as small as threads allow.

    Raises:
        UnsupportedError: Too many ranks or numbers, or numbers of another kind.
    """
    _check(meeting, place)
    if isinstance(meeting, SumNorm):
        _check_rows(meeting)
        return _in_rows(meeting, place, BLOCKS, f"vf_sum_norm_{_KINDS[meeting.dtype]}")
    item, width, kept, name = ITEM_BYTES[meeting.dtype], 0, 0, f"vf_sum_{_KINDS[meeting.dtype]}"
    if isinstance(meeting, Gather):
        name, width, kept = _GATHERS[item], meeting.width, meeting.kept
    groups, most = -(-meeting.items * item // GROUP), BLOCKS * REGION
    found = []
    for first in range(0, groups, most):
        last = min(first + most, groups)
        blocks = min(BLOCKS, -(-(last - first) // THREADS))
        params = Params(
            **_where(place),
            given=meeting.given,
            out=meeting.out,
            items=meeting.items,
            width=width,
            kept=kept,
            first=first,
            last=last,
            share=-(-(last - first) // blocks),
        )
        found.append((Launch(name, (blocks, 1, 1), THREADS), params))
    return tuple(found)


def norm_launches(norm: Norm) -> Launches:
    """What it takes where no rank meets another (UnsupportedError: see `fits`)."""
    _check_rows(norm)
    return _in_rows(norm, None, max(1, norm.rows), f"vf_norm_{_KINDS[norm.dtype]}")


def _in_rows(norm: Norm, place: Place | None, most: int, name: str) -> Launches:
    """A block for each row, `most` of them by one launch."""
    groups, found = norm.row_groups, []
    for row in range(0, norm.rows, most):
        rows = min(most, norm.rows - row)
        params = Params(
            **({} if place is None else _where(place)),
            given=norm.given,
            out=norm.total,
            added=norm.added,
            scale=norm.scale,
            normed=norm.normed,
            items=norm.items,
            width=norm.width,
            first=row * groups,
            last=(row + rows) * groups,
            share=groups,
            epsilon=norm.epsilon,
        )
        found.append((Launch(name, (rows, 1, 1), THREADS, _NORM_SHARED), params))
    return tuple(found)


def _where(place: Place) -> dict[str, Any]:
    return {
        "lanes": (ctypes.c_void_p * MOST_RANKS)(*place.lanes),
        "counts": place.counts,
        "stop": place.stop,
        "failed": place.failed,
        "patience": place.patience,
        "rank": place.rank,
        "size": len(place.lanes),
    }


def run(found: Launches, kernels: Kernels, stream: int) -> None:
    """Enqueues a meeting on `stream`; all ranks do, in one order. Capturable into a CUDA graph.

    Raises:
        LaunchError: The driver refused a kernel.
    """
    for launch, params in found:
        kernels.launch(launch, params, stream)


def _check(meeting: Sum | Gather | SumNorm, place: Place) -> None:
    if not 2 <= len(place.lanes) <= MOST_RANKS:
        raise UnsupportedError(
            "So many GPUs do not meet through their memory.",
            found=f"{len(place.lanes)} ranks",
            expected=f"2 to {MOST_RANKS}",
        )
    if meeting.dtype not in ITEM_BYTES or meeting.items >= _MOST_ITEMS:
        raise UnsupportedError(
            "GPUs do not meet over such a tensor.",
            found=f"{meeting.items} numbers in {meeting.dtype}",
            expected=f"fewer than {_MOST_ITEMS} in one of {', '.join(ITEM_BYTES)}",
        )


def _check_rows(norm: Norm) -> None:
    if not fits(norm):
        raise UnsupportedError(
            "Rows of such a size are not normalised here.",
            found=f"{norm.width} numbers in {norm.dtype}",
            expected=f"whole groups of {GROUP} bytes, {REGION} at most, in "
            f"one of {', '.join(ITEM_BYTES)}",
        )
