"""The kernels in which GPUs meet, compiled for the host: a copy of the library is a rank."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from functools import cache

import numpy as np
from numpy.typing import NDArray

from attention_backends import HOST_SOURCES, host_build
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.collectives import launcher
from vlmforge_plugins.collectives.compile import SOURCE


@cache
def library(rank: int) -> ctypes.CDLL:
    """A copy of its own: what is a block is told by what a library has once."""
    apart = "-fno-gnu-unique"  # or all copies would have one block between them
    made = host_build(HOST_SOURCES / "collectives.cpp", SOURCE.folders, apart)
    with tempfile.NamedTemporaryFile(suffix=f".{rank}.so") as copy:
        shutil.copy(made, copy.name)
        return ctypes.CDLL(copy.name)


class HostKernels:
    def __init__(self, rank: int) -> None:
        self._library = library(rank)

    def launch(self, launch: Launch, params: launcher.Params, stream: int) -> None:
        size = launch.grid[0], launch.threads, launch.shared_bytes
        self._library.vf_launch(launch.kernel.encode(), ctypes.byref(params), *size)


def aligned(size: int) -> NDArray[np.uint8]:
    memory = np.zeros(size + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size]
