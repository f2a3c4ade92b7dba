"""The program of a rank beside one on a `LateDevice`: a thread does what is enqueued, in order."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from late_device import LateDevice
from vlmforge.backends import cuda
from vlmforge.backends.cuda.device import T, Work
from vlmforge.backends.fake import HostBackend
from vlmforge.backends.ranks.child import main
from vlmforge.backends.ranks.processes import Place


class ThreadedDevice(LateDevice):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._works: SimpleQueue[Work] = SimpleQueue()
        threading.Thread(target=self._do_all, daemon=True).start()

    def _do_all(self) -> None:
        """What fails ends the rank: the first one would wait for ever where they meet."""
        status = 1
        try:
            while True:
                self._works.get()()
        except SystemExit as end:  # another rank is gone
            status = end.code if isinstance(end.code, int) else status
        except BaseException:  # noqa: BLE001 - the process ends
            traceback.print_exc()
        os._exit(status)

    @override
    def later(self, work: Work) -> None:
        self._works.put(work)

    @override
    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[T]) -> NDArray[T]:
        raise AssertionError("a rank that follows waits for nothing")

    @override
    def fetch(self, address: int, size: int) -> Any:
        raise AssertionError("a rank that follows waits for nothing")


@dataclass(frozen=True, slots=True)
class _Backend(HostBackend):
    @override
    def device(self, number: int = 0) -> ThreadedDevice:
        return ThreadedDevice()


if __name__ == "__main__":
    cuda.BACKEND = _Backend()
    main(Place.parsed(sys.argv[1]))
