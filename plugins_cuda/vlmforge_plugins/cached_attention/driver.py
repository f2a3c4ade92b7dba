"""The kernels of one cubin, through the CUDA driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from cuda.bindings import driver

from vlmforge_plugins.cached_attention.config import Sizes
from vlmforge_plugins.cached_attention.launcher import MAP_BYTES, Boxes, Params
from vlmforge_plugins.cached_attention.plan import Launch, Machine
from vlmforge_plugins.errors import LaunchError

KERNELS = ("vf_write", "vf_decode", "vf_decode_narrow", "vf_combine", "vf_prefill")


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """Calls the driver and returns what it gave beside the status.

    Raises:
        LaunchError: The status was not success.
    """
    status, *results = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise LaunchError(
            f"The CUDA driver refused {getattr(function, '__name__', function)}.",
            found=str(status),
            expected="CUDA_SUCCESS",
            fix="was the engine built for this GPU? `vlmforge inspect` lists its targets",
        )
    return results[0] if len(results) == 1 else tuple(results)


def machine(ordinal: int = 0) -> Machine:
    """The GPU with this number; a context on it must exist."""
    device = call(driver.cuDeviceGet, ordinal)
    attribute = driver.CUdevice_attribute
    counts = (
        attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
    )
    multiprocessors, shared = (call(driver.cuDeviceGetAttribute, c, device) for c in counts)
    return Machine(multiprocessors, shared)


def capability(ordinal: int = 0) -> int:
    """Compute capability of the GPU with this number, major times 10 plus minor."""
    device = call(driver.cuDeviceGet, ordinal)
    attribute = driver.CUdevice_attribute
    major = call(
        driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device
    )
    minor = call(
        driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device
    )
    return int(major) * 10 + int(minor)


class CudaKernels:
    """Loaded kernels. Make it once, where handles may be created; launching creates none.

    Args:
        binary: A cubin (or PTX, ending in a zero byte) that `compile` made for `sizes`.
        sizes: How it was compiled.

    Raises:
        LaunchError: The binary is for another GPU.
    """

    def __init__(self, binary: bytes, sizes: Sizes) -> None:
        self._module = call(driver.cuModuleLoadData, binary)
        self._functions = {
            name: call(driver.cuModuleGetFunction, self._module, name.encode()) for name in KERNELS
        }
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        shared = {
            "vf_decode": sizes.decode_bytes,
            "vf_decode_narrow": sizes.narrow.decode_bytes,
            "vf_prefill": sizes.prefill_bytes,
        }
        for name, size in shared.items():
            call(driver.cuFuncSetAttribute, self._functions[name], limit, size)
        # Decode starts beside a write's blocks only where these leave it the shared memory.
        carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        call(driver.cuFuncSetAttribute, self._functions["vf_write"], carveout, 100)

    @staticmethod
    @lru_cache(1024)  # an engine has two pools a layer
    def tile_map(boxes: Boxes) -> bytes:
        """A CUtensorMap; boxes are 64 elements wide, in the 128-byte swizzle."""
        made = call(
            driver.cuTensorMapEncodeTiled,
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,
            2,
            boxes.address,
            [driver.cuuint64_t(n) for n in (boxes.columns, boxes.rows)],
            [driver.cuuint64_t(2 * boxes.columns)],
            [driver.cuuint32_t(n) for n in (64, boxes.box_rows)],
            [driver.cuuint32_t(1)] * 2,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return ctypes.string_at(made.getPtr(), MAP_BYTES)

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        """Enqueues one kernel; the driver copies `params` before this returns."""
        enqueue(self._functions[launch.kernel], launch, params, stream)


def enqueue(function: object, launch: Launch, params: ctypes.Structure, stream: int) -> None:
    """Launches a kernel whose only argument is `params`, which the driver copies meanwhile."""
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    config = launch_config(launch, stream)
    call(driver.cuLaunchKernelEx, config, function, ctypes.addressof(arguments), 0)


@lru_cache(1024)  # a step of prompts has the same for every layer
def launch_config(launch: Launch, stream: int) -> driver.CUlaunchConfig:
    """The driver's description of a launch."""
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
    config.sharedMemBytes = launch.shared_bytes
    config.hStream = stream
    config.attrs = [_overlapping()] if launch.overlaps else []
    config.numAttrs = len(config.attrs)
    return config


@cache
def _overlapping() -> driver.CUlaunchAttribute:
    """Programmatic dependent launch."""
    value = driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value = value
    return attribute
