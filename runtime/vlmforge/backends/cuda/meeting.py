"""Where the GPUs of one host meet: small tensors by our kernels over memory that all of them see,
large ones by NCCL. Where one of both is not to be had, all goes by the other.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Mapping
from pathlib import Path

from msgspec import structs
from typing_extensions import override

from vlmforge.backends import Communicator
from vlmforge.backends.cuda.device import ITEM_BYTES, MeetingPlace, SumAndNorm, Tensor, Work
from vlmforge.backends.cuda.gpu import Gpu
from vlmforge.backends.cuda.nccl import Nccl
from vlmforge.backends.cuda.peers import Peers, load_kernels, norm_alone
from vlmforge.engine.chain import Collective
from vlmforge.errors import BackendUnavailableError, EngineError

logger = logging.getLogger("vlmforge")

# Bytes of a sum up to which it goes by our kernel, whose threads all wait for their own data: NCCL
# takes half as long again there (bench/RESULTS.md, "Several ranks on GPUs").
_SMALL = 1 << 20


class GpuMeetings(MeetingPlace):
    """See the module; one of the ways may be missing."""

    def __init__(
        self,
        gpu: Gpu,
        ranks: Communicator,
        peers: Peers | None,
        nccl: Nccl | None,
        files: Mapping[str, Path],
    ) -> None:
        self._gpu, self._ranks, self._peers, self._nccl = gpu, ranks, peers, nccl
        self._files, self._kernels = files, None if peers is None else peers.kernels
        self._lost = False
        known = weakref.WeakMethod(self._check)

        def waited() -> None:
            if (check := known()) is not None:
                check()

        gpu.waited = waited
        ranks.watch(self._give_up)

    @override
    def bind(self, call: Collective, given: Tensor, out: Tensor) -> Work:
        if call.kind == "all_reduce":
            return self._way(given).all_reduce(given, out)
        # It has no place for each rank's columns in NCCL.
        return (self._peers or self._way(given)).all_gather(given, out)

    @override
    def bind_norm(self, call: SumAndNorm) -> Work:
        if (way := self._way(call.given)) is self._peers:
            assert self._peers is not None
            if (whole := self._peers.sum_and_norm(call)) is not None:
                return whole
        add, norm = way.all_reduce(call.given, call.total), self._norm(call)

        def work() -> None:
            add()
            norm()

        return work

    def _norm(self, call: SumAndNorm) -> Work:
        if self._kernels is None:
            self._kernels = load_kernels(self._gpu, self._files)
        return norm_alone(self._gpu, structs.replace(call, given=call.total), self._kernels)

    @override
    def broadcast(self, given: int, out: int, count: int) -> Work:
        way = self._peers or self._nccl
        assert way is not None
        return way.broadcast(given, out, count)

    def _way(self, given: Tensor) -> Peers | Nccl:
        """By which such a tensor is summed."""
        size = math.prod(given.shape) * ITEM_BYTES[given.dtype]
        way = self._peers if size <= _SMALL else self._nccl
        found = way or self._peers or self._nccl
        assert found is not None
        return found

    def _give_up(self) -> None:
        """What waits for other ranks on the GPU ends. By any thread."""
        self._lost = True
        for way in (self._peers, self._nccl):
            if way is not None:
                way.give_up()

    def _check(self) -> None:
        """Whether what was waited for is what it should be."""
        failed = self._peers is not None and self._peers.failed
        if not (self._lost or failed):
            return
        self._ranks.check()
        raise EngineError(
            "The GPUs of the engine do not meet any more.",
            found="a rank that did not come to a meeting" if failed else "a rank that was lost",
            expected="the same steps on all ranks",
            fix="close the pipeline and make it again; if it happens again, nvidia-smi tells "
            "whether a GPU has failed",
        )


def meet_first(gpu: Gpu, ranks: Communicator, files: Mapping[str, Path]) -> GpuMeetings:
    """Every rank calls it at the same time; see `Device.meeting_place`."""
    peers = Peers.made(gpu, ranks, files)
    nccl = Nccl.made(gpu, ranks)
    if isinstance(peers, str) and isinstance(nccl, str):
        raise BackendUnavailableError(
            "The GPUs of this machine cannot meet.",
            found=f"no memory that they share ({peers}), and no NCCL ({nccl})",
            expected="GPUs that reach each other's memory, or NCCL",
            fix="pip install 'vlmforge[nccl]'; nvidia-smi topo -p2p r shows which reach each other",
        )
    if ranks.rank == 0:
        if isinstance(peers, str):
            logger.warning("ranks meet by NCCL alone, which is slower for few tokens: %s", peers)
        if isinstance(nccl, str):
            logger.warning(
                "ranks meet without NCCL, which is slower for long prompts on more than two GPUs: "
                "%s; pip install 'vlmforge[nccl]'",
                nccl,
            )
    return GpuMeetings(
        gpu,
        ranks,
        None if isinstance(peers, str) else peers,
        None if isinstance(nccl, str) else nccl,
        files,
    )
