"""Where ranks on the processor meet in the place of GPUs (see `vlmforge.backends.fake`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from vlmforge.backends import Communicator
from vlmforge.backends.cuda.device import MeetingPlace, SumAndNorm, Tensor, Work
from vlmforge.backends.fake_memory import memory_as, numbers_of, put
from vlmforge.backends.ranks import all_gather, all_reduce, exchange
from vlmforge.engine.chain import Collective


@dataclass(frozen=True, slots=True)
class HostMeetings(MeetingPlace):
    """See `MeetingPlace`. Sums are made in float32.

    As by kernels without a word about what overflows: steps run once over memory that nobody wrote.
    """

    ranks: Communicator

    @override
    def bind(self, call: Collective, given: Tensor, out: Tensor) -> Work:
        meet = all_reduce if call.kind == "all_reduce" else all_gather

        @np.errstate(over="ignore", invalid="ignore")
        def work() -> None:
            values = np.ascontiguousarray(numbers_of(given), np.float32)
            found = np.empty(out.shape, np.float32)
            meet(self.ranks, values, found)
            put(out, found)

        return work

    @override
    def broadcast(self, given: int, out: int, count: int) -> Work:
        def work() -> None:
            said = exchange(self.ranks, memory_as(given, np.int64, (count,)).tobytes())
            memory_as(out, np.int64, (count,))[:] = np.frombuffer(said[0], np.int64)

        return work

    @override
    def bind_norm(self, call: SumAndNorm) -> Work:
        width = (call.given.shape[-1],)
        scale = Tensor("scale", call.given.dtype, width, call.scale)

        @np.errstate(over="ignore", invalid="ignore")
        def work() -> None:
            found = np.empty(call.given.shape, np.float32)
            all_reduce(self.ranks, np.ascontiguousarray(numbers_of(call.given), np.float32), found)
            put(call.total, found)
            put(call.total, numbers_of(call.total) + numbers_of(call.added))
            total = numbers_of(call.total)  # as it was rounded
            mean = np.mean(total * total, -1, keepdims=True)
            put(call.normed, total / np.sqrt(mean + call.epsilon) * numbers_of(scale))

        return work
