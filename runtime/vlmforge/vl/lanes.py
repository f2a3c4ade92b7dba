"""Decoding on threads of its own, few enough that text is still answered while images decode."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

from PIL import Image

from vlmforge.vl.encoded import Cancelled, cancelled_error

LANES = max(2, min(4, len(os.sched_getaffinity(0)) // 2))
"""Images that are decoded at once for pipelines of this process."""

_ASK_S = 0.05


class _Lanes:
    """The threads. A child process that is forked has none of them: it begins its own."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.pool = ThreadPoolExecutor(LANES, thread_name_prefix="vlmforge-decode")


_lanes = _Lanes()


def decode_in_lane(job: Callable[[], Image.Image], cancelled: Cancelled) -> Image.Image:
    """Run `job` when a lane is free.

    A decoder that is inside of one long call cannot be interrupted. Its caller is not held by it:
    the job is left to end alone, and until then takes up its lane.

    Raises:
        CancelledError: `cancelled` said so, before or while the job ran.
    """
    try:
        future = _lanes.pool.submit(job)
    except RuntimeError:
        # The interpreter is ending. A thread that it waits for may still ask; pools are shut.
        return job()
    while not wait([future], timeout=_ASK_S).done:
        if cancelled():
            future.cancel()
            raise cancelled_error()
    return future.result()
