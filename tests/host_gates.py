"""The kernels of gated activations, compiled for the host."""

from __future__ import annotations

import ctypes
from functools import cache

from attention_backends import HOST_SOURCES, _compiled, _standard_library
from vlmforge_plugins.cached_attention.compile import SOURCES
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.gated_activation.compile import KERNELS
from vlmforge_plugins.gated_activation.launcher import Params

_HOST = HOST_SOURCES.parent / "host_gates"


@cache
def library() -> ctypes.CDLL:
    """Kept by the content of all that goes in."""
    places = (KERNELS, SOURCES, HOST_SOURCES, _HOST)
    files = [path for folder in places for path in sorted(folder.iterdir()) if path.is_file()]
    header = _standard_library()
    includes = (f"-I{folder}" for folder in (*places, header.parent))
    options = ["-shared", *includes, "-include", header.name]
    main = _HOST / "gated_activation.cpp"
    return ctypes.CDLL(str(_compiled(main, files, options, "gated_activation-", ".so")))


class HostGates:
    """See `Kernels`. Every thread must wait for the kernel in front, whatever it does then."""

    overlap = True

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        name, blocks = launch.kernel.encode(), launch.grid[0]
        status = library().vf_launch(name, ctypes.byref(params), blocks, launch.threads)
        assert status == 0, f"{launch.kernel}: a thread did not wait for the kernel in front"
