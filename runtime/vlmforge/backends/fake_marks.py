"""Moments of a device that does at once what it is told (see `vlmforge.backends.fake`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends.cuda.device import Arriving, Mark


@dataclass(frozen=True, slots=True)
class HostMark(Mark):
    """See `Mark`; `time.perf_counter`."""

    time: float

    @override
    def since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)
        return self.time - earlier.time


@dataclass(frozen=True, slots=True)
class Arrived(Arriving):
    """See `Arriving`."""

    end: Mark
    found: NDArray[np.uint8]

    @override
    def wait(self) -> NDArray[np.uint8]:
        return self.found
