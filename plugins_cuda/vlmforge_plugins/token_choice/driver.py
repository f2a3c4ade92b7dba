"""The choice of tokens on a GPU, through the CUDA driver."""

from __future__ import annotations

from cuda.bindings import driver

from vlmforge_plugins.cached_attention.config import Target
from vlmforge_plugins.cached_attention.driver import call, enqueue
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.token_choice.launcher import NAME, Params, overlaps


class CudaKernels:
    """See `Kernels`. Make it once, where handles may be created; launching creates none.

    Args:
        binary: A cubin, or PTX that ends in a zero byte.
        target: What it was compiled for.

    Raises:
        LaunchError: The binary is for another GPU.
    """

    def __init__(self, binary: bytes, target: Target) -> None:
        self.overlap = overlaps(target)
        self._module = call(driver.cuModuleLoadData, binary)
        self._function = call(driver.cuModuleGetFunction, self._module, NAME.encode())

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        """See `Kernels`."""
        enqueue(self._function, launch, params, stream)
