"""The collectives on a GPU, through the CUDA driver."""

from __future__ import annotations

from contextlib import suppress

from cuda.bindings import driver

from vlmforge_plugins.cached_attention.driver import call, enqueue
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.collectives.launcher import KERNELS, NORMS, Params
from vlmforge_plugins.errors import LaunchError


class CudaKernels:
    """See `Kernels`. Make it once, where handles may be created; launching creates none.

    Args:
        binary: A cubin, or PTX that ends in a zero byte.

    Raises:
        LaunchError: The binary is for another GPU.
    """

    def __init__(self, binary: bytes) -> None:
        self._module = call(driver.cuModuleLoadData, binary)
        self._functions = {
            name: call(driver.cuModuleGetFunction, self._module, name.encode()) for name in KERNELS
        }
        with suppress(LaunchError):  # of older engines, which do not ask for them
            for name in NORMS:
                found = call(driver.cuModuleGetFunction, self._module, name.encode())
                self._functions[name] = found

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        """See `Kernels`."""
        enqueue(self._functions[launch.kernel], launch, params, stream)
