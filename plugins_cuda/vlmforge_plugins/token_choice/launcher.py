"""Launches of the choice of tokens: what each is told.

No allocation, no synchronisation, no look at device memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

from vlmforge_plugins.cached_attention.config import Target
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.errors import UnsupportedError

NAME = "vf_choose"
THREADS = 1024
CANDIDATES = 1024
"""Likeliest tokens that choices by rank are made from; who needs more is left undecided."""
REPORTED = 20
MOST_VOCAB = 1 << 19
MOST_ROWS = (1 << 31) - 1
SHARED_BYTES = 17944
"""Of a block, beside a bit for each four logits."""
_MOST_EDITS = 1 << 31


class Params(ctypes.Structure):
    """`vf::Params` of kernels/row.cuh, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("logits", "choices", "edit_ids", "edit_factors", "edit_minus"),
                *("chosen", "chosen_logit", "normaliser", "best_ids", "best_logits", "scratch"),
            )
        ),
        *((name, ctypes.c_uint) for name in ("vocab", "edits", "reported", "told")),
    ]


@dataclass(frozen=True)
class Choosing:
    """A token for each row: what the graph of the same inputs and outputs chooses.

    Where it cannot be decided, `chosen` is -2, and what else is told of that row is of no use.

    Attributes:
        logits: Address of float32 `[rows, vocab]`, aligned to 16 bytes; they are left as they are.
        choices: float64 `[rows, 5]`: temperature, top-k (`vocab`: all), top-p, min-p, and a number
            in [0, 1) that decides, below 0 for the likeliest.
        edit_ids: int64 `[rows, edits]`, ids whose logits are changed before; an id may come again
            with the same numbers. Those outside of the vocabulary change nothing.
        edit_factors: float32 `[rows, edits]`; positive logits are divided by them, others
            multiplied. With 1 and a minus of 0 an edit changes nothing, and costs nothing.
        edit_minus: float64 `[rows, edits]`, taken from them then.
        chosen: int64 `[rows]`.
        scratch: `scratch_bytes(rows, vocab)`, aligned to 16 bytes.
        rows, vocab, edits: Sizes.
        told: Whether all that follow are asked for, too; of no use otherwise.
        chosen_logit, normaliser: float64 `[rows]`.
        best_ids, best_logits: int64 and float64 `[rows, reported(vocab)]`: the likeliest tokens.
    """

    logits: int
    choices: int
    edit_ids: int
    edit_factors: int
    edit_minus: int
    chosen: int
    scratch: int
    rows: int
    vocab: int
    edits: int
    told: bool = False
    chosen_logit: int = 0
    normaliser: int = 0
    best_ids: int = 0
    best_logits: int = 0


class Kernels(Protocol):
    """The compiled kernel on one GPU.

    Attributes:
        overlap: Whether it waits for the kernel in front of it (see `overlaps`).
    """

    overlap: bool

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        """Enqueues one kernel. `params` is read before this returns."""


def overlaps(target: Target) -> bool:
    """Whether what is compiled for it may start while the kernel in front of it ends."""
    return target.capability >= 90 and not target.is_ptx


def reported(vocab: int) -> int:
    """How many of the likeliest tokens are told of."""
    return min(REPORTED, vocab)


def scratch_bytes(rows: int, vocab: int) -> int:
    """What a launch needs to itself; little of it is touched."""
    return 4 * rows * _quads(vocab) * 4


def shared_bytes(vocab: int) -> int:
    """Shared memory of a block."""
    return SHARED_BYTES + 4 * -(-_quads(vocab) // 32)


def launch_of(choosing: Choosing, *, overlap: bool) -> tuple[Launch, Params]:
    """The kernel, and what it is told.

    Raises:
        UnsupportedError: Too few or too many rows, logits or edits, or an address that is not
            aligned.
    """
    c = choosing
    wide = (c.logits, c.scratch)
    told = (c.chosen_logit, c.normaliser, c.best_ids, c.best_logits)
    numbers = (c.choices, c.edit_ids, c.edit_minus, c.chosen, *(told if c.told else ()))
    aligned = not any(a % 16 for a in wide) and not any(a % 8 for a in numbers)
    sizes = 0 < c.rows <= MOST_ROWS and 0 < c.vocab <= MOST_VOCAB and 0 <= c.edits < _MOST_EDITS
    if not sizes or not aligned or c.edit_factors % 4:
        raise UnsupportedError(
            "The kernel that chooses tokens does not cover such tensors.",
            found=str(c),
            expected=f"some rows of 1 to {MOST_VOCAB} logits, these and the scratch memory aligned "
            "to 16 bytes, all else to its numbers",
        )
    params = Params(
        *(c.logits, c.choices, c.edit_ids, c.edit_factors, c.edit_minus, c.chosen, *told),
        *(c.scratch, c.vocab, c.edits, reported(c.vocab), int(c.told)),
    )
    shared = shared_bytes(c.vocab)
    return Launch(NAME, (c.rows, 1, 1), THREADS, shared, overlaps=overlap), params


def _quads(vocab: int) -> int:
    return -(-vocab // 4)
