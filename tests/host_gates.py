"""The kernels of gated activations, compiled for the host."""

from __future__ import annotations

import ctypes
from functools import cache

from attention_backends import HOST_SOURCES, host_build
from vlmforge_plugins.cached_attention.compile import SOURCES
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.gated_activation.compile import KERNELS
from vlmforge_plugins.gated_activation.launcher import Params

_HOST = HOST_SOURCES.parent / "host_gates"


@cache
def library() -> ctypes.CDLL:
    """Kept by the content of all that goes in."""
    return ctypes.CDLL(str(host_build(_HOST / "gated_activation.cpp", (KERNELS, SOURCES, _HOST))))


class HostGates:
    """See `Kernels`. Every thread must wait for the kernel in front, whatever it does then."""

    overlap = True

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        name, blocks = launch.kernel.encode(), launch.grid[0]
        status = library().vf_launch(name, ctypes.byref(params), blocks, launch.threads)
        assert status == 0, f"{launch.kernel}: a thread did not wait for the kernel in front"
