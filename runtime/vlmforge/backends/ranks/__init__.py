"""Tensor-parallel ranks: one process each, which meet at the collectives of their chains.

Source of the layout: Megatron-LM, https://arxiv.org/abs/1909.08053.
"""

from __future__ import annotations

import numpy as np

from vlmforge.backends import Communicator, FloatArray

_WORDS = 256  # bytes of a reason


def exchange(ranks: Communicator, data: bytes) -> list[bytes]:
    """What each rank gives, by rank: of all equally long."""
    found: list[list[bytes]] = [[] for _ in range(ranks.size)]
    for start in range(0, len(data), ranks.room):
        piece = np.frombuffer(data[start : start + ranks.room], np.uint8).astype(np.float32)
        for rank, values in enumerate(ranks.meet(piece)):
            found[rank].append(values.astype(np.uint8).tobytes())
    return [b"".join(pieces) for pieces in found]


def hindrance(ranks: Communicator, own: str) -> str:
    """What keeps one of the ranks from something; "" on all if nothing does on any."""
    said = exchange(ranks, own.encode()[:_WORDS].ljust(_WORDS, b"\0"))
    words = [text.rstrip(b"\0").decode(errors="ignore") for text in said]
    return next((f"rank {rank}: {text}" for rank, text in enumerate(words) if text), "")


def all_reduce(ranks: Communicator, values: FloatArray, out: FloatArray) -> None:
    """The sum of all ranks' `values` into `out` of the same shape, contiguous both.

    They are added in the order of the ranks, so that all have the same bits, by any transport.
    """
    given, summed = values.reshape(-1), out.reshape(-1)
    for start in range(0, given.size, ranks.room):
        target = summed[start : start + ranks.room]
        first, second, *more = ranks.meet(given[start : start + ranks.room])
        np.add(first, second, out=target)
        for part in more:
            np.add(target, part, out=target)


def all_gather(ranks: Communicator, values: FloatArray, out: FloatArray | None) -> None:
    """All ranks' `values` `[..., n]` side by side along the last axis, into `out` `[..., m]`.

    m <= size * n: shares may be padded. None: this rank has no use for them. A row fits a meeting.
    """
    width = values.shape[-1]
    rows = values.reshape(-1, width)
    target = None if out is None else out.reshape(-1, out.shape[-1])
    step = max(1, ranks.room // width)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        parts = ranks.meet(piece.reshape(-1))
        if target is None:
            continue
        for rank, part in enumerate(parts):
            place = target[start : start + step, rank * width : (rank + 1) * width]
            place[:] = part.reshape(piece.shape)[:, : place.shape[1]]
